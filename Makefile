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

.DEFAULT_GOAL := help
.PHONY: help train deepseek compare benchmark idle clock memory ends zero precision overlap backwards \
	test test-outside test-gpu lint format clean

help:  ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

train: $(READY)  ## train a small language model with DualPipe (options: ARGS="--steps 10")
	@$(BIN)/python -m experiments.train_lm.train_lm $(ARGS)

deepseek: $(READY)  ## train a small mixture of experts of DeepSeek-V3's shape (options: ARGS="--steps 10")
	@$(BIN)/python -m experiments.deepseek_mini.deepseek_mini $(ARGS)

compare: $(READY)  ## train one small model with every schedule and compare (options: ARGS="--ranks 2")
	@$(BIN)/python -m experiments.compare.schedules $(ARGS)

idle: $(READY)  ## replay every schedule over many sizes and compare idle time (options: ARGS="--ranks 8")
	@$(BIN)/python -m experiments.compare.idle $(ARGS)

clock: $(READY)  ## time a step of every schedule over processes that sleep (options: ARGS="--ranks 4")
	@$(BIN)/python -m experiments.by_the_clock.by_the_clock $(ARGS)

benchmark: $(READY)  ## measure a step beside the limit and the usual recipe (options: ARGS="--ranks 2")
	@$(BIN)/python -m experiments.benchmarks.benchmarks $(ARGS)

memory: $(READY)  ## compile steps for a TPU and compare what they hold (options: ARGS="--width 512")
	@$(BIN)/python -m experiments.compiled.memory $(ARGS)

ends: $(READY)  ## count what embedding and head cost, in bytes and in idle time (options: ARGS="--ranks 4")
	@$(BIN)/python -m experiments.sharded.ends $(ARGS)

zero: $(READY)  ## count what sharding over the data axis saves on a device (options: ARGS="--shards 2")
	@$(BIN)/python -m experiments.sharded.zero $(ARGS)

precision: $(READY)  ## train in float32 and in bfloat16 and draw both losses (options: ARGS="--steps 50")
	@$(BIN)/python -m experiments.precision.precision $(ARGS)

overlap: $(READY)  ## compile steps for TPUs that are not there, and read what compute hides (minutes)
	@$(BIN)/python -m experiments.compiled.overlap $(ARGS)

backwards: $(READY)  ## what a TPU's compiler makes of full backwards, and of halves apart (minutes)
	@$(BIN)/python -m experiments.compiled.backwards $(ARGS)

test: lint  ## style, types, layers and every test (options: PYTEST_ARGS="tests/test_cli.py")
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

test-outside:  ## a larger published model, too; brings 1 GB of packages in an environment of its own
	@$(MAKE) --no-print-directory VENV=.venv-outside EXTRAS=dev,outside-models-large \
		PYTEST_ARGS="tests/flax/outside_qwen3.py" test

test-gpu:  ## what hides collectives on eight H100s; brings 5 GB of packages in an environment of its own
	@$(MAKE) --no-print-directory VENV=.venv-gpu EXTRAS=dev,gpu-aot \
		PYTEST_ARGS="tests/experiments/compiled/gpus.py tests/preflight/test_gpu.py" test

lint: $(READY)  ## style, types and layers
	@$(BIN)/ruff format --check --quiet . || { echo "not formatted: run 'make format'"; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	@$(BIN)/lint-imports --no-logo

format: $(READY)  ## rewrite the sources in the house's format
	@$(BIN)/ruff check --quiet --fix . || true
	@$(BIN)/ruff format .

clean:  ## remove the environment and all caches
	rm -rf $(VENV) .jax_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

$(READY): pyproject.toml $(CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "dualpipe-jax needs Python 3.11 or newer with its venv module;" \
		"none was found. Install one, or name it: make PYTHON=/path/to/python3.11"; exit 1; } >&2
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "dualpipe-jax needs Python 3.11 or newer; PYTHON=$(PYTHON) is not."; exit 1; } >&2
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]' \
		$(addprefix -c ,$(CONSTRAINTS))
	@touch $@
