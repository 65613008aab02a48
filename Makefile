# `make demo` and `make test` are the two commands a newcomer needs; `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The first python3 in the supported range; `make setup PYTHON=/path/to/python3.12` takes another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' >/dev/null 2>&1 && echo $$p && break; done)
VENV ?= .venv
OUT ?= runs/demo
# More words for pip. On Linux the package index serves torch built for CUDA, some gigabytes; where a CPU is enough:
#   make setup PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
LOG := $(VENV)/setup.log
# Quiet when it works, the end of pip's own account when it does not.
PIP = $(BIN)/python -m pip install --no-input --progress-bar off -c constraints.txt $(PIP_ARGS)
OR_SHOW = >>$(LOG) 2>&1 || { tail -n 40 $(LOG) >&2; echo "set-up failed; the whole log is in $(LOG)" >&2; exit 1; }

.PHONY: help setup demo picture docs test lint format types test-fast test-typed test-slow fuzz audit zoo bench crosscheck bench-generation bench-training organism \
	constraints clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | while IFS=$$'\t' read -r name text; do \
		printf '  make %-17s %s\n' "$$name" "$$text"; done

setup: $(STAMP)  ## create .venv and install what constraints.txt pins

# Done again only when what is installed has changed.
$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ] || ! $(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; then \
		echo "saepatch needs Python 3.10 to 3.13, and '$(or $(PYTHON),python3)' is none: install one, or name it: make setup PYTHON=/path/to/python3.12" >&2; exit 1; fi
	@if [ ! -x $(BIN)/python ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		rm -rf $(VENV); $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "could not create $(VENV); on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }; fi
	@: >$(LOG)
	@echo "set-up 1/2: torch into $(VENV) (a few minutes the first time)"
	@# torch first and alone, so that nothing else gets to choose its build.
	@$(PIP) torch $(OR_SHOW)
	@echo "set-up 2/2: saepatch and its tools"
	@$(PIP) -e '.[dev]' $(OR_SHOW)
	@touch $@

demo: $(STAMP)  ## patch, steer and restore latents of the embedded model; the report lands in runs/demo
	@$(BIN)/saepatch demo --out $(OUT)

test: lint types test-fast  ## lint, type check and the default tests

lint: $(STAMP)  ## ruff: rules and formatting; import-linter: the layers; vulture: dead code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/vulture

format: $(STAMP)  ## rewrite the sources the way lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)  ## mypy
	$(BIN)/mypy

test-fast: $(STAMP)  ## the default tests alone: CPU, offline
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow" $(PYTEST_ARGS)

test-typed: $(STAMP)  ## the short tests, with the shapes and types of every annotated function checked
	@# Shapes by jaxtyping, the rest by beartype (tests/checked_types.py).
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not whole" \
		--jaxtyping-packages=saepatch,training,experiments,checked_types.check $(PYTEST_ARGS)

test-slow: $(STAMP)  ## the tests that take minutes, the organism's retraining among them
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

fuzz: $(STAMP)  ## hostile settings, files and texts, more than 20,000 of them (some minutes)
	SAEPATCH_FUZZ=100 $(BIN)/python -m pytest tests/fuzz $(PYTEST_ARGS)

audit: $(STAMP)  ## ruff's security rules, and known vulnerabilities of what constraints.txt pins (asks PyPI)
	$(BIN)/ruff check --select S saepatch training experiments
	@$(PIP) -e '.[audit]' $(OR_SHOW)
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip

zoo: $(STAMP)  ## check every model type of the installed transformers, tiny and random; writes docs/models.md (half an hour)
	@PYTHONPATH=.:tests $(BIN)/python -m zoo

bench: $(STAMP)  ## time exact sweeps beside sae-lens, TransformerLens, nnsight and plain hooks (ten minutes on one thread)
	@$(PIP) -e '.[bench]' $(OR_SHOW)
	@$(BIN)/python -m experiments.benchmarks.patching --out runs/bench-patching

crosscheck: $(STAMP)  ## compare our numbers with sae-lens, TransformerLens, nnsight and plain formulas; fails where they differ
	@$(PIP) -e '.[bench]' $(OR_SHOW)
	@$(BIN)/python -m experiments.benchmarks.crosscheck --out runs/crosscheck

bench-training: $(STAMP)  ## time training steps beside sae-lens' trainer, and compare what they find (half an hour on one thread)
	@$(BIN)/python -m experiments.benchmarks.training --out runs/bench-training

bench-generation: $(STAMP)  ## time generation under a splice beside the bare model, sae-lens and nnsight (ten minutes on one thread)
	@$(PIP) -e '.[bench]' $(OR_SHOW)
	@$(BIN)/python -m experiments.benchmarks.generation --out runs/bench-generation

docs: $(STAMP)  ## the documentation in docs/ with the reference from the docstrings, as a site in site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "Documentation: site/index.html (with a search where it is served: $(BIN)/python -m http.server --bind 127.0.0.1 -d site)"

picture: $(STAMP)  ## the README's picture, from the report of `make demo`
	@$(BIN)/python -m experiments.picture --run $(OUT)

organism: $(STAMP)  ## retrain the embedded model and its SAEs from the seed (up to an hour on two cores)
	$(BIN)/python -m training.organism

constraints: $(STAMP)  ## rewrite constraints.txt from what .venv holds (run it after an upgrade that passed the tests)
	$(PIP) -e '.[dev,dashboard,bench]' $(OR_SHOW)
	$(BIN)/python .ci/constraints.py >constraints.txt.new
	mv constraints.txt.new constraints.txt
	touch $(STAMP)

clean:  ## remove the environment, caches and builds; keeps runs/
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
