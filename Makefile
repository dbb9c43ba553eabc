# make demo    train, evaluate and ask a STORM on the built-in task (under 10 minutes on 2 cores)
# make test    every fast test; make test-slow the others; make lint ruff and mypy
# make evidence    the comparison of docs/results.md (hours; goes on where it stopped)

PYTHON ?= python3
BIN := .venv/bin
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: demo test test-slow lint evidence clean

demo: .venv/runtime
	$(BIN)/python -m benchmarks.demo --out=demo

test: .venv/development
	$(BIN)/python -m pytest --durations=15

test-slow: .venv/development
	$(BIN)/python -m pytest -m slow --durations=15

lint: .venv/development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

evidence: .venv/runtime
	$(BIN)/python -m benchmarks.shapes --out=runs/evidence

clean:
	rm -rf .venv demo

.venv/runtime: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/development: .venv/runtime requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
