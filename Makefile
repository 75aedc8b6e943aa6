# Two commands do everything on a machine with Python (3.10+) and make:
#   make demo   set up, train four recipes side by side, show the result
#   make test   set up, check style and types, run the test suite
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed
RESULTS := benchmarks/results
# test files are shared out to as many processes as there are cores, four at most
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# threads that wait for others sleep: several processes share the cores in the tests
test test-long wheel: export OMP_WAIT_POLICY = PASSIVE

.PHONY: demo test test-long lint benchmarks docs wheel switches clean

demo: $(STAMP)
	$(BIN)/python -m examples.demo

test: $(STAMP) lint
	$(PYTEST)

test-long: $(STAMP)
	$(PYTEST) -m "long or not long" --timeout 3600

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmarks: $(STAMP)
	$(BIN)/python -m benchmarks --json $(RESULTS)/cpu.json --markdown $(RESULTS)/cpu.md \
	    --summary $(RESULTS)/cpu_summary.md

docs: $(STAMP)
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet --builder html docs build/docs

# The wheel, installed alone in a fresh environment, must pass the tests outside the checkout.
wheel: $(STAMP)
	tests/installed_wheel.sh $(BIN)/python

# Each page of docs/codebases, followed from a fresh environment: minutes to install and to run.
switches: $(STAMP)
	$(BIN)/python -m tests.adapters.switches

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
