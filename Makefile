# Every target makes the virtual environment it needs and is safe to run again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install test lint format quickstart clean

help:  ## Show the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(INSTALLED): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,dev]'
	touch $@

install: $(INSTALLED)  ## Create .venv and install the package with all extras

test: $(INSTALLED)  ## Run the tests that need no GPU
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -m 'not gpu' --numprocesses 2 --dist worksteal

lint: $(INSTALLED)  ## Check the code's style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)  ## Put the code in the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quickstart: $(INSTALLED)  ## Train, generate, detect and report on handwritten digits, on the CPU
	$(BIN)/unigendet quickstart --out quickstart

clean:  ## Remove the virtual environment and what the targets left
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis quickstart
