# Two commands do everything on a machine with Python (3.10+) and make:
#   make demo   set up, train four recipes side by side, show the result
#   make test   set up, check style and types, run the test suite
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed
DEMO_STAMP := $(VENV)/installed-demo
RESULTS := benchmarks/results
# test files are shared out to as many processes as there are cores, four at most
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# threads that wait for others sleep: several processes share the cores in the tests
test test-long wheel: export OMP_WAIT_POLICY = PASSIVE

.PHONY: demo test test-long lint benchmarks docs wheel switches clean

demo: $(DEMO_STAMP)
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

# The demo installs what it needs; the tests install the rest into the same environment. Without
# --no-compile pip would compile thousands of modules that the demo never imports.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
    --constraint constraints.txt --editable

$(DEMO_STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[demo]'
	touch $@

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[dev]'
	-$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib  # before tests in several processes do
	touch $@ $(DEMO_STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info
