PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.complete

.PHONY: setup test lint fuzz matrix benchmark clean

setup: $(STAMP)

# The stamp is written last, so that an interrupted set-up is done again.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fuzz: setup
	$(BIN)/python -m pytest -q -m thorough

matrix: setup
	$(BIN)/python release/matrix.py

benchmark: setup
	$(BIN)/python benchmarks/prefill.py
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/tasks.py
	$(BIN)/python benchmarks/training.py

clean:
	rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache .hypothesis
