# `make sweep` and `make test` are the commands of the README. Each target creates .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
# Files of tests that run side by side. Two clusters at once want some 12 GB of memory.
JOBS ?= 2
PARALLEL := -n $(JOBS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help sweep test test-fast coverage check format docs clean

help:  ## List the targets
	@echo "make TARGET"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

sweep: .venv/installed  ## Compare ways of upcycling on a small model, here, in minutes
	$(BIN)/python sweeps/num_experts.py

test: .venv/installed-test $(if $(T),,check)  ## make check and every test; T=PATH: the tests of that path alone
	$(BIN)/python -m pytest $(or $(T),$(PARALLEL))

test-fast: .venv/installed-test  ## The tests that start no cluster and train for seconds at most
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

# Apart from `test`: it makes Python's part of the tests half as slow again.
coverage: .venv/installed-test  ## Every test, with the share of raymoe that they run
	$(BIN)/python -m pytest $(PARALLEL) --cov=raymoe --cov-report=term

check: .venv/installed-test  ## Lint, format, types, import order and documentation; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: .venv/installed-test  ## Format the code, and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/installed-test  ## Generate the page of all settings and build the documentation into site/
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "raymoe needs Python 3.10 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	@touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test,dev]'
	@touch $@

clean:  ## Remove .venv and what sweeps wrote here
	rm -rf .venv runs mlflow.db mlruns site
