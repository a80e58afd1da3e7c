# Two commands do everything on a machine with nothing but Python 3.11: `make sweep` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WORKERS ?= 2

.PHONY: help install sweep test walk faults lint base clean

help:            ## show this
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

install: $(INSTALLED)            ## make the environment in .venv, with the versions in constraints.txt

sweep: $(INSTALLED)            ## the main job on the embedded study: DPO against SimPO, verdict and report
	$(BIN)/python -m harness.sweep +method=simpo,dpo

test: lint            ## format, lint, types and all tests
	$(BIN)/python -m pytest -q --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

walk: $(INSTALLED)            ## both arms on 70 architectures at tiny size, by TRL's engine and ours; writes docs/architectures.md
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.walk --write

KILLS ?= 200
faults: $(INSTALLED)            ## kill, damage, double and starve a small study, hundreds of times; every time it must end the same
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults --kills $(KILLS) --work $$(mktemp -d)/faults

lint: $(INSTALLED)            ## format, lint, order of imports and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

base: $(INSTALLED)            ## build the embedded study's base and data again, in minutes, from a seed
	$(BIN)/python -m harness.embedded

clean:            ## remove the environment and all results
	rm -rf $(VENV) results/*/ results/.cache
