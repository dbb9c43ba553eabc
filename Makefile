# make demo       train, evaluate and ask a STORM on the built-in task (under 10 minutes on 2 cores)
# make test       every fast test; make test-slow the others; make lint: ruff and mypy
# make evidence   the comparison of docs/results.md (hours; goes on where it stopped)

PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python
PIP := $(RUN) -m pip install --disable-pip-version-check
FAMILIES := shape,place,shape,place,colour,needle,order

.PHONY: demo test test-slow lint evidence clean

demo: .venv/runtime
	$(RUN) -m storm_jax.tasks.shapes --out=data/shapes --clips=10000 --seed=0 --families=$(FAMILIES)
	$(RUN) -m storm_jax.data.tokenizer --data=data/shapes/train.json --out=data/shapes/tokenizer
	$(RUN) -m storm_jax.data check --config=configs/tiny.py:stage=sft
	$(RUN) train.py --config=configs/tiny.py:stage=align --workdir=runs/align
	$(RUN) train.py --config=configs/tiny.py:stage=sft --workdir=runs/sft --config.init_from=runs/align
	$(RUN) eval.py --workdir=runs/sft --benchmark=shapes --require=$(FAMILIES)
	$(RUN) predict.py --workdir=runs/sft --video=data/shapes/media/test/000006.mp4 --question="Which flash came first?"
	@echo 'training curves: runs/sft/curves.png'
	@echo 'ask about a file of your own:'
	@echo '    $(RUN) predict.py --workdir=runs/sft --video=clip.mp4 --question="Which flash came first?"'

test: .venv/development
	$(RUN) -m pytest --durations=10

test-slow: .venv/development
	$(RUN) -m pytest -m slow --durations=10

lint: .venv/development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

evidence: .venv/runtime
	$(RUN) -m benchmarks.shapes --out=runs/evidence

clean:
	rm -rf .venv data/shapes data_report runs/align runs/sft

.venv/runtime: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "STORM needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(RUN) || $(PYTHON) -m venv .venv
	@echo 'installing (a minute or two)'
	$(PIP) -r requirements.txt
	touch $@

.venv/development: .venv/runtime requirements-dev.txt
	@echo 'installing test extras (a minute or two)'
	$(PIP) -r requirements-dev.txt
	touch $@
