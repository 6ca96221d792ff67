# Two commands: `make quickstart` and `make test`. Each sets up what it needs in a virtual environment of its own.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
WORKDIR ?= runs/quickstart
PART ?= 1/1
# Files in the order of their names: the longest come early, so that no worker ends long after the other.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=8
SMOKE := tests/test_tree.py tests/methods/test_methods.py tests/methods/test_sparse.py tests/select/test_granularity.py tests/delta tests/merge \
  tests/parallel tests/train/test_loop.py tests/train/test_step.py tests/train/test_selection.py tests/cli tests/models/test_adapters.py tests/kernels/test_block_sddmm_gpu.py

.PHONY: help install quickstart test test-peers test-cuda test-newest mutations lint format faults commands clean

help:  ## Show this list.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(VENV)/.base: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -U pip
	$(PIP) install -q -e .
	@touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) install -q -e '.[test]'
	@touch $@

# torch by itself first: the version here has a CPU build, later extras then have nothing to choose.
$(VENV)/.peers: $(VENV)/.test
	$(PIP) install -q torch==2.13.0
	$(PIP) install -q -e '.[test,peers]'
	@touch $@

install: $(VENV)/.base  ## Set up .venv with jft in it.

quickstart: $(VENV)/.base  ## Pretrain, fine-tune, add and negate on real data; leaves runs/quickstart/report.html.
	$(BIN)/jft quickstart --workdir=$(WORKDIR)

test: $(VENV)/.test  ## Everything but the comparisons with torch and its libraries.
	$(PYTEST) -m "not peers and not optimized"
	JFT_TEST_OPTIMIZED=1 $(PYTEST) -m "not peers and optimized"

# Beside the environment, with what its modules import: the rest of what it depends on is a training stack and its servers.
$(VENV)/fusionbench: $(VENV)/.peers
	$(PIP) install -q --no-deps --target $@ fusion-bench==0.2.33 bidict hydra-core omegaconf==2.3.0 antlr4-python3-runtime==4.9.3 \
	  lightning lightning-utilities pytorch-lightning torchmetrics
	@touch $@

test-peers: $(VENV)/.peers $(VENV)/fusionbench  ## The comparisons with torch, transformers, peft, mergekit and libtpu.
	$(PYTEST) -m peers

# Beside the environment: installed in it, the plugin would look for a GPU whenever a program starts.
$(VENV)/cuda: $(VENV)/.test
	version=$$($(BIN)/python -c "import jax; print(jax.__version__)"); \
	  $(PIP) install -q --no-deps --target $@ jax-cuda12-plugin==$$version jax-cuda12-pjrt==$$version
	@touch $@

test-cuda: $(VENV)/cuda  ## The GPU kernels, compiled by JAX's CUDA plugin for GPUs that need not be here.
	PYTHONPATH=$(VENV)/cuda $(BIN)/python -m pytest -m peers -k gpu tests/kernels tests/delta/test_compiled.py

test-newest: $(VENV)/.test  ## A smoke subset, for another interpreter: make test-newest PYTHON=python3.13 VENV=.venv-newest
	$(PYTEST) -m "not peers and not slow and not optimized" $(SMOKE)

mutations: $(VENV)/.test  ## Change the code line by line and see a test fail each time: PART=3/40 for a share of the list.
	$(BIN)/python tests/mutate.py --part $(PART)

lint: $(VENV)/.test  ## Format check, lint and types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.test  ## Format and fix what can be fixed.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

faults: $(VENV)/.test  ## Kills, signals, full disks, damage, second starts, several processes; prints the table of docs/faults.md.
	$(BIN)/python -m tests.faults

commands: $(VENV)/.test  ## Run every command on tiny files, and write what they print to docs/commands.md.
	$(BIN)/python -m tests.commands

clean:  ## Remove the environments and caches.
	rm -rf .venv .venv-newest .pytest_cache .mypy_cache .ruff_cache build *.egg-info
