# The two commands of the README: `make sweep` and `make test`. Both create .venv and install what they need.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: sweep test test-fast check docs clean

sweep: .venv/installed
	$(BIN)/python sweeps/num_experts.py

test: .venv/installed-test check
	$(BIN)/python -m pytest

test-fast: .venv/installed-test
	$(BIN)/python -m pytest -m "not slow"

check: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed-test
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

clean:
	rm -rf .venv runs mlflow.db mlruns
