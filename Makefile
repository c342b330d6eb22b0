# `make help` lists what there is. VENV=DIR puts the environment elsewhere, PYTHON=PROGRAM makes it with another Python.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help

VENV ?= .venv
VENV_NEWEST ?= .venv-newest
VENV_JAX_0_11 ?= .venv-jax-0.11
VENV_CUDA ?= .venv-cuda
EXTRAS ?= dev,tpu
WORKERS ?= 2

PYTHON ?= $(shell .ci/find-python 3.11 3.12 3.13 3.14)
PYTHON_NEWEST ?= $(shell .ci/find-python 3.12 3.13 3.14)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
bin = $(VENV)/bin
pytest = $(bin)/python -m pytest

##@ Use
.PHONY: env
env: $(VENV)/.ready ## make the environment in .venv (or $VENV)

# An environment is finished when its .ready is there: what stopped halfway is made anew. What goes in is what
# pyproject.toml says, which picks the pair of JAX and Flax that belongs to this Python.
%/.ready: pyproject.toml
	$(if $(PYTHON),,$(error no Python with venv and ensurepip that is new enough))
	@if [[ -n "$$(ls -A "$*" 2>/dev/null)" && ! -e "$*/pyvenv.cfg" ]]; then \
	  echo "$*: not an environment, and not empty; choose another VENV" >&2; exit 2; fi
	@echo "making the environment in $* with $(PYTHON); this takes some minutes"
	"$(PYTHON)" -m venv --clear "$*"
	"$*/bin/python" -m pip install -qq --editable '.[$(EXTRAS)]' $(CONSTRAINTS)
	touch "$@"

.PHONY: quickstart
# Memory in huge pages, as benchmarks/cpu_vs_torch.py has it.
quickstart: export GLIBC_TUNABLES := glibc.malloc.hugetlb=1
quickstart: env ## train a small model on Python's own library, from text to samples
	$(bin)/lmjax data prepare configs/quickstart.yaml
	$(bin)/lmjax train configs/quickstart.yaml
	$(bin)/lmjax evaluate runs/quickstart
	$(bin)/lmjax generate runs/quickstart --prompt 'def' --prompt 'import' --prompt 'class' --prompt '    for'
	@echo 'The curves: runs/quickstart/report.html'

.PHONY: switch
switch: export GLIBC_TUNABLES := glibc.malloc.hugetlb=1
switch: env ## train a small Switch decoder and its dense twin with three seeds, into one picture
	$(bin)/lmjax data prepare configs/quickstart.yaml
	for seed in 0 1 2; do \
	  $(bin)/lmjax train configs/switch_small_dense.yaml run_dir=runs/switch/dense-$$seed train.seed=$$seed; \
	  $(bin)/lmjax train configs/switch_small.yaml run_dir=runs/switch/experts-$$seed train.seed=$$seed; \
	done
	$(bin)/lmjax report runs/switch/dense-* runs/switch/experts-* --output runs/switch/report.html

##@ Test
.PHONY: test-fast
test-fast: env ## the tests that take under a second each (2 minutes)
	$(pytest) -n $(WORKERS) -m fast

.PHONY: test
test: env ## everything that matters in a small form (15 minutes)
	$(pytest) -n $(WORKERS)

.PHONY: test-all
test-all: env ## the slow tests, after make test (20 minutes)
	$(pytest) -n $(WORKERS) -m slow

.PHONY: test-newest test-newest-fast test-newest-kernels test-newest-plan test-jax-0.11
test-newest: ## make test on Python 3.12 or newer with the newest JAX
	$(MAKE) test VENV=$(VENV_NEWEST) PYTHON='$(PYTHON_NEWEST)'

test-newest-fast: ## make test-fast on Python 3.12 or newer with the newest JAX
	$(MAKE) test-fast VENV=$(VENV_NEWEST) PYTHON='$(PYTHON_NEWEST)'

test-newest-kernels: ## the Hopper kernels in Pallas's interpreter, which JAX has from 0.12 on (5 minutes)
	$(MAKE) env VENV=$(VENV_NEWEST) PYTHON='$(PYTHON_NEWEST)'
	$(VENV_NEWEST)/bin/python -m pytest -n $(WORKERS) -m 'not proof' tests/ops/test_attention_flash_hopper.py

test-newest-plan: ## the planner's estimates beside what the compilers of the newest JAX say, in a small form (4 minutes)
	$(MAKE) env VENV=$(VENV_NEWEST) PYTHON='$(PYTHON_NEWEST)'
	$(VENV_NEWEST)/bin/python -m pytest -n $(WORKERS) -m 'not proof' tests/plan/test_memory.py

test-jax-0.11: ## make test on Python 3.12 or newer with the oldest JAX that it may have
	$(MAKE) test VENV=$(VENV_JAX_0_11) PYTHON='$(PYTHON_NEWEST)' CONSTRAINTS="'jax==0.11.2'"

# With JAX 0.10 DeepSeek-V3's step has arrays that grow with experts x tokens, so that these are made with the newest.
in_newest = $(MAKE) env VENV=$(1) EXTRAS=dev,$(2) PYTHON='$(PYTHON_NEWEST)' && $(1)/bin/python -m pytest -m proof

.PHONY: proof-plan
proof-plan: ## compile published models, recipes and drawn cases for TPU, beside their estimates (Python 3.12 or newer; 45 minutes)
	$(call in_newest,$(VENV_NEWEST),tpu) tests/plan/test_published_steps.py -k "llama3_8b_fits or 64_chips_and"
	$(VENV_NEWEST)/bin/python -m pytest -m proof -n $(WORKERS) -rP tests/plan/test_memory.py tests/plan/test_recipes.py \
	  tests/plan/test_moments_on_host.py -k "tpus or nobody_has_seen"

.PHONY: proof-kernels
proof-kernels: env ## 200 drawn cases of each of our kernels in Pallas's interpreters, and that for TPU compiled for five generations
	$(pytest) -n $(WORKERS) -m '' tests/ops/test_attention_flash_tpu.py tests/ops/test_attention_flash_compile.py
	$(MAKE) env VENV=$(VENV_NEWEST) PYTHON='$(PYTHON_NEWEST)'
	$(VENV_NEWEST)/bin/python -m pytest -n $(WORKERS) -m '' tests/ops/test_attention_flash_hopper.py

.PHONY: proof-cuda
proof-cuda: ## compile attention kernels, steps, recipes and drawn cases for H200 in .venv-cuda (Python 3.12 or newer; gigabytes)
	$(call in_newest,$(VENV_CUDA),cuda13) -n $(WORKERS) tests/ops/test_attention_cudnn.py \
	  tests/ops/test_attention_flash_hopper_compile.py
	$(call in_newest,$(VENV_CUDA),cuda13) tests/plan/test_published_steps.py -k 8_h200
	$(VENV_CUDA)/bin/python -m pytest -m proof -n $(WORKERS) tests/plan/test_memory.py tests/plan/test_traffic.py \
	  tests/plan/test_recipes.py tests/plan/test_moments_on_host.py -k "h200 or gpus"

.PHONY: proof-moe
proof-moe: ## compile the steps of Mixtral-8x7B and DeepSeek-V3 for TPU (Python 3.12 or newer; ten minutes, 9 GiB)
	$(call in_newest,$(VENV_NEWEST),tpu) tests/plan/test_published_steps.py -k "deepseek or 128_chips"

.PHONY: proof-moe-gpu
proof-moe-gpu: ## compile Mixtral-8x7B's step for 8 H200 in .venv-cuda (Python 3.12 or newer; gigabytes to install)
	$(call in_newest,$(VENV_CUDA),cuda13) tests/plan/test_published_steps.py -k 8_gpus

##@ Check
.PHONY: lint
lint: env ## ruff: rules and format
	$(bin)/python -m ruff check
	$(bin)/python -m ruff format --check

.PHONY: format
format: env ## ruff: repair what it can
	$(bin)/python -m ruff check --fix
	$(bin)/python -m ruff format

.PHONY: typecheck
typecheck: env ## pyright
	$(bin)/python -m pyright --pythonpath $(bin)/python

##@ Help
.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^##@ / { print "\n" substr($$0, 5) } /^[a-z0-9._-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' Makefile
