# `make demo` and `make test` need only Python 3.10 or later, pip and make.
PYTHON ?= python3
BIN := .venv/bin
# Idle OpenMP threads that spin would slow every other process on the machine.
export OMP_WAIT_POLICY := passive

.PHONY: demo test nightly check format clean

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

demo: .venv/installed
	rm -rf runs/demo
	$(BIN)/spamprune run recipes/fc_cancer.yaml --out runs/demo --jobs 2

test: .venv/installed
	$(BIN)/python -m pytest

# The smoke variant of every recipe, from training to report.
nightly: .venv/installed
	rm -rf runs/nightly
	for recipe in recipes/*.yaml; do \
	  $(BIN)/spamprune run $$recipe@smoke --out runs/nightly/$$(basename $$recipe .yaml) || exit 1; \
	done

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv runs
