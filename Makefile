# Requirements: Python 3.10 or newer and make.
PYTHON ?= python3
BIN := .venv/bin
# The CPU build of PyTorch is sufficient. To install it on Linux, set PIP_EXTRA_INDEX_URL to PyTorch's CPU index.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

# Optional dependencies that setup installs, as pyproject.toml names them.
EXTRAS ?= dev

.PHONY: setup demo test soak lint docs gpu wheels clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed; try make PYTHON=python3.12" >&2; exit 2; }
	@echo "creating .venv and installing into it" >&2
	@$(PYTHON) -m venv .venv
	@$(PIP) torch
	@$(PIP) --editable '.[$(EXTRAS)]'
	@$(PIP) --no-deps taming-transformers-rom1504  # apart from torch, its dependencies belong to modules that are not used here
	@touch $@

# Four commands of the README with their default settings; the last line of stdout of each is one JSON object.
demo: setup
	@for step in tokenize pretrain_ar probe report; do $(BIN)/accelerate launch pipelines/$$step.py || exit 1; done

# Several test processes share the cores, so waiting OpenMP threads must sleep instead of spinning.
# Test files run in the order of the folders: by default files with few tests, which are often the slow ones, come last.
test: export OMP_WAIT_POLICY = PASSIVE
test: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -m "not soak" --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

soak: setup
	@$(BIN)/python -m pytest

lint: setup
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# Documentation site in build/site. With --strict, a broken link or a missing reference is an error.
docs: setup
	@$(PIP) --editable '.[docs]'
	@$(BIN)/mkdocs build --strict

# Check the project on an NVIDIA GPU in at most nine minutes; docs/gpu.md explains the parts and the variables.
# On a machine without internet, the packages that its Python lacks come from wheels in .whl/.
GPU_PYTHON ?= $(if $(DRY)$(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
OUT ?= runs/gpu
WHEEL_SITE := build/wheels
gpu: export PYTHONPATH := $(CURDIR)/$(WHEEL_SITE):$(PYTHONPATH)
gpu: export OMP_WAIT_POLICY = PASSIVE
gpu: $(if $(DRY),setup)
	@rm -rf $(WHEEL_SITE)
	@if ls .whl/*.whl >/dev/null 2>&1; then $(GPU_PYTHON) -m pip --disable-pip-version-check install --quiet --no-index --no-deps \
		--no-compile --no-cache-dir --target $(WHEEL_SITE) .whl/*.whl; fi
	@$(GPU_PYTHON) -m pipelines.gpu --out "$(OUT)" $(if $(DRY),--dry) $(if $(PARTS),--parts $(PARTS)) \
		$(if $(VIDEOS),--videos "$(VIDEOS)")

# Download the wheels for `make gpu` on a Linux machine with x86-64 that has PyTorch, scikit-learn, accelerate and pytest.
WHEEL_PYTHON ?= 3.12
WHEELS := av jsonargparse docstring-parser typeshed-client vector-quantize-pytorch einx frozendict loguru torch-einops-utils \
	webdataset braceexpand torchmetrics lightning-utilities threadpoolctl xxhash xformers nvidia-cuda-runtime-cu12
wheels: setup
	@mkdir -p .whl
	@$(BIN)/python -m pip --disable-pip-version-check download --quiet --no-deps --only-binary=:all: --dest .whl \
		--python-version $(WHEEL_PYTHON) --implementation cp $(foreach n,2_28 2_27 2_17,--platform manylinux_$(n)_x86_64) \
		--platform manylinux2014_x86_64 --constraint constraints.txt 'av>=17,<19' $(filter-out av,$(WHEELS))
	@du -sh .whl >&2

clean:
	rm -rf .venv build *.egg-info
