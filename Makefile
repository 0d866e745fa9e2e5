# Everything happens in this checkout: the environment in .venv, build products and caches in build/.
PYTHON ?= python3
SUITES ?= masked_conv2d shifted_conv2d concat_elu gated_unit training logistic_mixture_nll reparameterize group_norm_act upfirdn2d nearest_code sampling code_prior generator decoder encoder stylegan2 vae vqvae crowded
NATIVE_TESTS ?= tests/ops tests/nn tests/sampling

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
NATIVE := $(shell find csrc -type f)
SANITIZE := FASTGEN_SANITIZE=address,undefined
LIBRARIES = $$($${CXX:-g++} -print-file-name=libasan.so):$$($${CXX:-g++} -print-file-name=libstdc++.so.6)

export MPLCONFIGDIR := $(CURDIR)/build/cache/matplotlib
export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/build/cache/inductor
export TRITON_CACHE_DIR := $(CURDIR)/build/cache/triton

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint format asan gpu bench build clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/demo.stamp ## install, train a small model on real digits, sample it fast and slowly, compare (3 minutes)
	$(BIN)/fastgen demo

test: $(VENV)/test.stamp ## install and run every test, two at a time
	$(BIN)/python -m pytest --numprocesses 2 $(ARGS)

lint: $(VENV)/dev.stamp ## ruff, clang-format and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	find csrc tests -name '*.c' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy

format: $(VENV)/dev.stamp ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format
	find csrc tests -name '*.c' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

asan: $(VENV)/test.stamp ## native tests under AddressSanitizer and UBSan
	rm -rf build/asan
	$(SANITIZE) FASTGEN_CUDA=0 $(BIN)/python setup.py -q build --build-lib build/asan
	$(SANITIZE) LD_PRELOAD=$(LIBRARIES) ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/asan \
	    $(BIN)/pytest -p no:cacheprovider $(NATIVE_TESTS) $(ARGS)

# With .venv where make test has completed it and its torch sees the GPU, else with PYTHON, which then needs all packages.
gpu: ## build, test and measure on a GPU (10 minutes), into bench/results; fails without a GPU
	$(PYTHON) -m bench.gpu $(ARGS)

bench: $(VENV)/bench.stamp ## measure SUITES and write bench/results
	for suite in $(SUITES); do $(BIN)/python -m bench $$suite --plot || exit 1; done

build: $(VENV)/test.stamp ## compile the native modules again (incremental)
	$(BIN)/python setup.py -q build_ext --inplace

clean: ## remove build products and caches; the downloaded packages in .venv stay
	rm -rf build dist *.egg-info .*_cache fastgen/*.so $(VENV)/*.stamp
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastgen needs Python 3.10 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# The build's tools first, so that they are the pinned ones and nothing is downloaded again when C++ sources change.
$(VENV)/%.stamp: $(BIN)/python pyproject.toml setup.py constraints.txt $(NATIVE)
	$(PIP) --quiet setuptools pybind11 ninja
	$(PIP) --no-build-isolation --editable '.$(if $(filter-out demo,$*),[$*])'
	touch $@
