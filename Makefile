PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

$(BIN)/latencyprism: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("LatencyPrism needs Python 3.10 or newer, this is %s" % sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	touch $@

$(VENV)/.dev: $(BIN)/latencyprism
	$(BIN)/python -m pip install --quiet --editable '.[demo,dev]'
	touch $@

demo: $(BIN)/latencyprism
	$(BIN)/latencyprism demo

test: $(VENV)/.dev
	$(BIN)/python scripts/run_tests.py

lint: $(VENV)/.dev
	$(BIN)/python scripts/run_tests.py --lint-only

clean:
	rm -rf $(VENV) build dist out
