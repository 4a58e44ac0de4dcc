# gigatome: `make demo` runs the main job, `make test` lints and tests. Both set up .venv first; nothing else is needed.
PYTHON ?= python3
BIN    := .venv/bin
STAMP  := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## create .venv and install gigatome with everything it can use (about 6 GB with PyTorch)

$(STAMP): pyproject.toml setup.py $(wildcard src/native/*)
	@command -v $(PYTHON) >/dev/null || { echo "Missing: $(PYTHON). Install Python 3.11 or newer, or call make PYTHON=/path/to/python." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1). Call make PYTHON=python3.11, say." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Missing: the venv module of $(PYTHON). On Debian and Ubuntu: apt-get install python3-venv." >&2; exit 1; }
	@echo "==> Setting up .venv (once; PyTorch is large, allow a few minutes)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]' || { echo "Installation failed: see pip's message above. A network, or a pip index that has the packages, and 8 GB of disk are needed." >&2; exit 1; }
	@touch $(STAMP)

demo: setup  ## make a small cohort, train, embed, evaluate, look; writes gigatome-demo/report.html
	@$(BIN)/gigatome demo

test: lint  ## lint, then run the whole test suite
	@echo "==> Tests"
	@$(BIN)/python -m pytest

lint: setup  ## ruff, pyright and the layers of docs/design.md
	@echo "==> Lint"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright
	@$(BIN)/lint-imports

format: setup  ## format the code and mend what ruff can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: setup  ## build the documentation into site/
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	@$(BIN)/mkdocs build --strict

clean:  ## remove what the targets made, .venv included
	rm -rf .venv site build dist gigatome-demo
