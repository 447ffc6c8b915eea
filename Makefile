# Each target makes .venv and installs what is missing; nothing else needs to be typed on a fresh machine.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
LOWEST := .venv-lowest

.PHONY: train test test-slow test-lowest scorecard lint bench clean

$(VENV)/.train: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $(VENV)/.train $@

train: $(VENV)/.train
	$(BIN)/python train.py

# Two processes side by side, a file of tests in one of them.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

scorecard: $(VENV)/.dev
	$(BIN)/python -m pytest tests/scorecard -m "slow or not slow" --scorecard docs/scorecard.md

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

# Every dependency at the lowest version that pyproject.toml allows, but for those named as in FREE="torch triton".
# What is old warns of what is new beside it, so here a warning is no error; types are those of the newest versions.
test-lowest:
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet packaging
	$(LOWEST)/bin/python tests/lowest_versions.py $(FREE) > $(LOWEST)/versions.txt
	$(LOWEST)/bin/python -m pip install --quiet --editable ".[dev]" --constraint $(LOWEST)/versions.txt
	$(LOWEST)/bin/python -m pytest --override-ini filterwarnings= --deselect tests/test_architecture.py::test_mypy_strict

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.train
	$(BIN)/bitnet bench train --compare float,ternary,ternary_int16,ternary_int8,binary --threads 1,2

clean:
	rm -rf $(VENV) $(LOWEST) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
