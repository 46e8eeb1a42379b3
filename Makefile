# Requirements: Python 3.10 or newer and make.
PYTHON ?= python3
BIN := .venv/bin
# The CPU build of PyTorch is sufficient. To install it on Linux, set PIP_EXTRA_INDEX_URL to PyTorch's CPU index.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: setup demo test soak lint docs clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed; try make PYTHON=python3.12" >&2; exit 2; }
	@echo "creating .venv and installing into it" >&2
	@$(PYTHON) -m venv .venv
	@$(PIP) torch
	@$(PIP) --editable '.[dev]'
	@$(PIP) --no-deps taming-transformers-rom1504  # apart from torch, its dependencies belong to modules that are not used here
	@touch $@

# Four commands of the README with their default settings; the last line of stdout of each is one JSON object.
demo: setup
	@for step in tokenize pretrain_ar probe report; do $(BIN)/accelerate launch pipelines/$$step.py || exit 1; done

# Several test processes share the cores, so waiting OpenMP threads must sleep instead of spinning.
test: export OMP_WAIT_POLICY = PASSIVE
test: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -m "not soak" --numprocesses auto --maxprocesses 8 --dist loadfile

soak: setup
	@$(BIN)/python -m pytest

lint: setup
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# Documentation site in build/site. With --strict, a broken link or a missing reference is an error.
docs: setup
	@$(PIP) --editable '.[docs]'
	@$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv build *.egg-info
