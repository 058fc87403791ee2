# `make` lists the targets. Every target sets up what it needs in .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SITE := docs/_build/html

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-fast test-gpu lint docs docs-serve build clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: $(VENV)/.recipes ## train three tiny models on a CPU, draw the plot, save a checkpoint (minutes)
	$(BIN)/python -m recipes.quickstart.run

test: $(VENV)/.dev lint ## everything that needs no GPU: linter, types, all tests, the site (under 8 minutes)
	$(BIN)/python -m pytest -m "not gpu" -n 2

test-fast: $(VENV)/.dev ## the quick tests (under 2 minutes)
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2

test-gpu: $(VENV)/.dev ## the tests that need a CUDA GPU
	$(BIN)/python -m pytest -m gpu

lint: $(VENV)/.dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.dev ## build the site into docs/_build/html; a warning is an error
	$(BIN)/sphinx-build --builder html --fail-on-warning --nitpicky --quiet docs $(SITE)

docs-serve: docs ## build the site and serve it at http://127.0.0.1:8000
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory $(SITE) 8000

build: $(VENV)/.release ## the wheel and the source distribution in dist/, checked
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) runs dist build docs/_build

# What each group of targets installs, with the versions of constraints.txt.
$(VENV)/.recipes $(VENV)/.dev $(VENV)/.release: $(VENV)/.%: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$*]"
	touch $@
