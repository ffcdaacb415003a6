# The two commands a newcomer needs: `make demo` and `make test`. Each makes .venv and installs what it needs.
# Both use one thread: their problems are so small that more threads only wait for each other.
PYTHON ?= python3
BIN := .venv/bin
# processes of the tests
JOBS ?= 2

.PHONY: demo test lint types bench clean

demo: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/bilevel-fit

test: .venv/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed-dev
	$(BIN)/mypy

bench: .venv/.installed-test
	$(BIN)/python benchmarks/hypergradients.py

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip

.venv/.installed: .venv/bin/python pyproject.toml
	$(BIN)/pip install --quiet -e .
	touch $@

.venv/.installed-test: .venv/bin/python pyproject.toml
	$(BIN)/pip install --quiet -e ".[test]"
	touch $@ .venv/.installed

.venv/.installed-dev: .venv/bin/python pyproject.toml
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@ .venv/.installed .venv/.installed-test

clean:
	rm -rf .venv dist runs
