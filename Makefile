# Each target makes .venv and installs what is missing; nothing else needs to be typed on a fresh machine.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: train test test-slow scorecard lint bench clean

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

test: $(VENV)/.dev
	$(BIN)/python -m pytest

scorecard: $(VENV)/.dev
	$(BIN)/python -m pytest tests/scorecard -m "slow or not slow" --scorecard docs/scorecard.md

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.train
	$(BIN)/bitnet bench train --compare float,ternary,ternary_int16,ternary_int8,binary --threads 1,2

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
