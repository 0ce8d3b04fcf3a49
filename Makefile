# What a contributor runs, what the hook runs and what CI runs: the same commands.
# Every target sets up .venv by itself and sets it up again when what it depends on changes.

# The Python that makes .venv: the first one found that is 3.11 or newer, or PYTHON=/path/to/python3.
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13 python3.14 python; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo $$python; break; }; done)

# The newest releases in an environment of their own:
#   make test VENV=.venv-newest PYTHON=python3.13 CONSTRAINTS=
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Passed on: make train ARGS="--steps 10"; make test PYTEST_ARGS="tests/test_cli.py -x"
ARGS ?=
EXTRAS ?= dev
# Tests of a file mostly go to one process, and share what it has set up.
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist worksteal

# The environment of published models.
OUTSIDE := VENV=.venv-outside EXTRAS=dev,finetune

FAULTS_ARGS ?= -q
# Calls for each class of mistakes in each argument.
WRONG_CALLS ?= 10

.DEFAULT_GOAL := help
.PHONY: help train deepseek finetune test faults wrong-calls test-outside test-gpu docs site wheel lint format clean \
	compare idle table search clock benchmark hardware graphs overlap backwards memory offload slices ends zero balance precision \
	fuzz-losses

help:  # the targets below, under the headings that begin with ##@
	@awk -F ':.*## ' '/^##@ / { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

##@ Use (options: ARGS="--steps 10", ARGS="--help")

train: $(READY)  ## train a small language model with DualPipe
	@$(BIN)/python -m experiments.train_lm.train_lm $(ARGS)

deepseek: $(READY)  ## train a small mixture of experts of DeepSeek-V3's shape
	@$(BIN)/python -m experiments.deepseek_mini.deepseek_mini $(ARGS)

finetune:  ## train a published Llama, Qwen3 or Gemma 3; brings 1 GB of packages in an environment of its own
	@$(MAKE) --no-print-directory $(OUTSIDE) .venv-outside/.ready
	@.venv-outside/bin/python -m experiments.finetune.finetune $(ARGS)

##@ Develop

test: lint  ## style, types, layers and every test (options: PYTEST_ARGS="tests/test_cli.py")
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

faults: $(READY)  ## training runs that are killed, pre-empted, short of disk, or lose a process (minutes)
	@$(BIN)/python -m pytest tests/faults $(FAULTS_ARGS)

wrong-calls: $(READY)  ## tens of thousands of wrong calls; their figures go into docs/reliability.md (minutes)
	@WRONG_CALLS=$(WRONG_CALLS) $(BIN)/python -m pytest tests/wrong_calls/test_wrong_calls.py $(ARGS)

test-outside:  ## published models and their weights, too; brings 1 GB of packages in an environment of its own
	@$(MAKE) --no-print-directory $(OUTSIDE) test PYTEST_ARGS="tests/flax/outside_qwen3.py \
		tests/from_loss/outside_models.py tests/experiments/finetune/outside_finetune.py"

test-gpu:  ## the collectives that compute hides on eight H100s; brings 5 GB of packages in an environment of its own
	@$(MAKE) --no-print-directory VENV=.venv-gpu EXTRAS=dev,gpu-aot \
		PYTEST_ARGS="tests/experiments/compiled/gpus.py tests/experiments/hardware/gpus.py \
		tests/preflight/test_gpu.py" test

docs:  ## the site of docs/, in docs/_build/html; brings an environment of its own (minutes)
	@$(MAKE) --no-print-directory VENV=.venv-docs EXTRAS=docs site

site: $(READY)
	@$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --fresh-env docs docs/_build/html
	@echo "docs/_build/html/index.html"

wheel:  ## wheel and sdist in dist/, checked, installed into an empty environment, where the pages' code runs (minutes)
	rm -rf dist .venv-wheel .venv-installed && $(PYTHON) -m venv .venv-wheel && $(PYTHON) -m venv .venv-installed
	.venv-wheel/bin/python -m pip install --quiet --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS)) \
		build check-wheel-contents twine
	.venv-wheel/bin/python -m build --outdir dist .
	.venv-wheel/bin/twine check --strict dist/*
	.venv-wheel/bin/check-wheel-contents dist/*.whl
	.venv-installed/bin/python -m pip install --quiet --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS)) \
		"$$(ls dist/*.whl)[train,tpu-aot]" ipython
	.venv-installed/bin/python docs/run_code.py

lint: $(READY)  ## style, types and layers
	@$(BIN)/ruff format --check --quiet . || { echo "not formatted: run 'make format'"; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	@$(BIN)/lint-imports --no-logo

format: $(READY)  ## rewrite the sources in the house's format
	@$(BIN)/ruff check --quiet --fix . || true
	@$(BIN)/ruff format .

clean:  ## remove the environment and all caches
	rm -rf $(VENV) .venv-docs .venv-wheel .venv-installed dist docs/_build docs/experiments .jax_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

##@ Laboratory (experiments; options: ARGS="--ranks 4", ARGS="--help")

compare: $(READY)  ## train one small model with every schedule: losses, memory, time
	@$(BIN)/python -m experiments.compare.schedules $(ARGS)

idle: $(READY)  ## replay every schedule over many sizes: idle time
	@$(BIN)/python -m experiments.compare.idle $(ARGS)

table: $(READY)  ## all schedules in one table, and even splits of layers beside balanced ones
	@$(BIN)/python -m experiments.compare.all_schedules $(ARGS)

search: $(READY)  ## search for orders beside the named schedules (minutes)
	@$(BIN)/python -m experiments.compare.search $(ARGS)

clock: $(READY)  ## time a step of every schedule over processes that sleep
	@$(BIN)/python -m experiments.by_the_clock.by_the_clock $(ARGS)

benchmark: $(READY)  ## measure a step beside the limit and the usual recipe
	@$(BIN)/python -m experiments.benchmarks.benchmarks $(ARGS)

hardware: $(READY)  ## measure layers, ticks, steps and schedules on this machine's GPUs or TPUs (under eight minutes)
	@$(BIN)/python -m experiments.hardware.hardware $(ARGS)

graphs:  ## which loops of a tick the host decides, in programs for absent H100s (minutes); needs 5 GB as test-gpu does
	@$(MAKE) --no-print-directory VENV=.venv-gpu EXTRAS=dev,gpu-aot .venv-gpu/.ready
	@.venv-gpu/bin/python -m experiments.hardware.graphs $(ARGS)

overlap: $(READY)  ## which transfers compute hides, in programs for absent TPUs (half an hour)
	@$(BIN)/python -m experiments.compiled.overlap $(ARGS)

backwards: $(READY)  ## full backwards beside split ones, in programs for absent TPUs (half an hour)
	@$(BIN)/python -m experiments.compiled.backwards $(ARGS)

memory: $(READY)  ## the memory of steps, by their own account and a TPU's compiler (minutes)
	@$(BIN)/python -m experiments.compiled.memory $(ARGS)

slices: $(READY)  ## pipelines across TPU slices beside data parallelism, in programs (an hour)
	@$(BIN)/python -m experiments.compiled.slices $(ARGS)

offload: $(READY)  ## activations in the host's memory, in programs for absent TPUs (an hour)
	@$(BIN)/python -m experiments.compiled.offload $(ARGS)

fuzz-losses: $(READY)  ## random losses through from_loss beside JAX's own gradients (200 programs; minutes)
	@$(BIN)/python -m experiments.fuzz_losses.fuzz_losses $(ARGS)

ends: $(READY)  ## the cost of embedding and head, in bytes and in idle time
	@$(BIN)/python -m experiments.sharded.ends $(ARGS)

zero: $(READY)  ## the bytes that sharding over the data axis takes off a device
	@$(BIN)/python -m experiments.sharded.zero $(ARGS)

balance: $(READY)  ## train deepseek_mini with and without the moving bias, loads side by side (a quarter of an hour)
	@for rate in 0.01 0; do $(BIN)/python -m experiments.deepseek_mini.deepseek_mini \
		--bias-rate $$rate --output runs/balance/$$rate $(ARGS) || exit 1; done
	@$(BIN)/python -m experiments.deepseek_mini.balance runs/balance/0.01 runs/balance/0 --output runs/balance

precision: $(READY)  ## train in float32 and in bfloat16, held-out losses one after the other
	@for dtype in float32 bfloat16; do $(BIN)/python -m experiments.train_lm.train_lm \
		--dtype $$dtype --steps 300 --output runs/precision/$$dtype $(ARGS) || exit 1; done

$(READY): pyproject.toml $(CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "dualpipe-jax needs Python 3.11 or newer with its venv module;" \
		"none was found. Install one, or name it: make PYTHON=/path/to/python3.11"; exit 1; } >&2
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "dualpipe-jax needs Python 3.11 or newer; PYTHON=$(PYTHON) is not."; exit 1; } >&2
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]' \
		$(addprefix -c ,$(CONSTRAINTS))
	@touch $@
