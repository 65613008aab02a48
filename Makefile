# Start with `make demo` and `make test`; `make help` lists all targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The first python3 in the supported range; choose another with `make setup PYTHON=/path/to/python3.12`.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' >/dev/null 2>&1 && echo $$p && break; done)
VENV ?= .venv
OUT ?= runs/demo
# Further arguments for pip. On Linux, PyPI's torch is built for CUDA (several gigabytes); for a CPU-only build:
#   make setup PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
PYTEST_ARGS ?=

# Tests start many processes, each of which would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
LOG := $(VENV)/setup.log
# Quiet on success; on failure the end of pip's log is printed.
PIP = $(BIN)/python -m pip install --no-input --progress-bar off -c constraints.txt $(PIP_ARGS)
OR_SHOW = >>$(LOG) 2>&1 || { tail -n 40 $(LOG) >&2; echo "set-up failed; the whole log is in $(LOG)" >&2; exit 1; }

.PHONY: help setup demo picture docs test lint format types test-fast test-typed test-slow fuzz mutants kills audit zoo bench crosscheck bench-generation bench-training real organism \
	constraints clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | while IFS=$$'\t' read -r name text; do \
		printf 'make %-17s %s\n' "$$name" "$$text"; done

setup: $(STAMP)  ## create .venv with the versions pinned in constraints.txt

# Runs again only if the dependencies have changed.
$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ] || ! $(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; then \
		echo "saepatch needs Python 3.10 to 3.13, not '$(or $(PYTHON),python3)': install it, or run make setup PYTHON=/path/to/python3.12" >&2; exit 1; fi
	@if [ ! -x $(BIN)/python ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		rm -rf $(VENV); $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "could not create $(VENV); on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }; fi
	@: >$(LOG)
	@echo "set-up 1/2: torch into $(VENV) (a few minutes the first time)"
	@# torch first, so that no other package determines its build.
	@$(PIP) torch $(OR_SHOW)
	@echo "set-up 2/2: saepatch and its tools (log: $(LOG))"
	@$(PIP) -e '.[dev]' $(OR_SHOW)
	@touch $@

demo: $(STAMP)  ## run the demo on the embedded model; report in runs/demo
	@$(BIN)/saepatch demo --out $(OUT)

test: lint types test-fast  ## lint, types and test-fast

lint: $(STAMP)  ## ruff, import-linter (layers) and vulture (dead code)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/vulture

format: $(STAMP)  ## fix and format the sources with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)  ## type check with mypy
	$(BIN)/mypy

test-fast: $(STAMP)  ## the default tests (CPU, offline)
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow" $(PYTEST_ARGS)

test-typed: $(STAMP)  ## the short tests with run-time checks of shapes and types
	@# Shapes by jaxtyping, the rest by beartype (tests/checked_types.py).
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not whole" \
		--jaxtyping-packages=saepatch,training,experiments,checked_types.check $(PYTEST_ARGS)

test-slow: $(STAMP)  ## tests that take minutes, such as retraining the embedded model
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

fuzz: $(STAMP)  ## more than 20,000 hostile settings, files and texts (minutes)
	SAEPATCH_FUZZ=100 $(BIN)/python -m pytest tests/fuzz $(PYTEST_ARGS)

mutants: $(STAMP)  ## put errors into the numeric code, each of which a test has to notice (15 min)
	PYTHONPATH=tests $(BIN)/python -m mutants

kills: $(STAMP)  ## kill commands at random moments and run them again (half an hour)
	PYTHONPATH=.:tests:tests/common $(BIN)/python -m kills

audit: $(STAMP)  ## security lint and known vulnerabilities of dependencies (uses PyPI)
	$(BIN)/ruff check saepatch training experiments
	@$(PIP) -e '.[audit]' $(OR_SHOW)
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

zoo: $(STAMP)  ## check all model types in transformers; writes docs/models.md (30 min)
	@PYTHONPATH=.:tests:tests/common $(BIN)/python -m zoo

bench: $(STAMP)  ## compare the speed of sweeps with other libraries (10 min)
	@$(PIP) -e '.[bench]' $(OR_SHOW)
	@$(BIN)/python -m experiments.benchmarks.patching --out runs/bench-patching

crosscheck: $(STAMP)  ## compare results with other libraries; fails if they differ
	@$(PIP) -e '.[bench]' $(OR_SHOW)
	@$(BIN)/python -m experiments.benchmarks.crosscheck --out runs/crosscheck

bench-training: $(STAMP)  ## compare training with sae-lens' trainer: speed and quality (30 min)
	@$(BIN)/python -m experiments.benchmarks.training --out runs/bench-training

bench-generation: $(STAMP)  ## compare the speed of generation under a splice (10 min)
	@$(PIP) -e '.[bench]' $(OR_SHOW)
	@$(BIN)/python -m experiments.benchmarks.generation --out runs/bench-generation

real: $(STAMP)  ## study a real model: make real MODEL=FOLDER DATA=TEXTS.jsonl
	@$(BIN)/python -m experiments.real --model '$(MODEL)' --data '$(DATA)' --out $(or $(REAL_OUT),runs/real) $(REAL_ARGS)

docs: $(STAMP)  ## build the documentation with the API reference in site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "Documentation: site/index.html (to use its search, run $(BIN)/python -m http.server --bind 127.0.0.1 -d site)"

picture: $(STAMP)  ## draw the README's picture from the report of make demo
	@$(BIN)/python -m experiments.picture --run $(OUT)

organism: $(STAMP)  ## retrain the embedded model and its SAEs (up to 1 h on two cores)
	$(BIN)/python -m training.organism

constraints: $(STAMP)  ## write the versions in .venv to constraints.txt (after an upgrade)
	$(PIP) -e '.[dev,dashboard,bench]' $(OR_SHOW)
	$(BIN)/python .ci/constraints.py >constraints.txt.new
	mv constraints.txt.new constraints.txt
	touch $(STAMP)

clean:  ## remove the environment, caches and builds, but not runs/
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
