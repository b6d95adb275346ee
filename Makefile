PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.complete

.PHONY: setup test lint fuzz benchmark hub clean

# The account on the Hub that cards link to: make hub OWNER=name
OWNER ?= OWNER

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

benchmark: setup
	$(BIN)/python benchmarks/prefill.py
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/tasks.py
	$(BIN)/python benchmarks/training.py

build/tasks: | setup
	$(BIN)/python datasets_scripts/build.py --out $@ --tasks mano-mini brevo-mini lano-mini --rows 20000

hub: setup build/tasks
	$(BIN)/python release/assemble.py --out build/hub --dataset build/tasks --owner $(OWNER)

clean:
	rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache .hypothesis
