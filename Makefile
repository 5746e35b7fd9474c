# Two commands need nothing installed by hand: `make demo` and `make test`. The first call of either makes .venv (some minutes);
# later calls start at once, and a changed constraints.txt, pyproject.toml or csrc/ is picked up.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

SYSTEM_PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTHON := $(BIN)/python
# Bytecode is made by whoever imports a module first, here even where the environment says that nobody shall: most
# modules are never imported, and compiling all of them takes a minute.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(PYTHON) -m pip --disable-pip-version-check install --quiet --no-compile
OUT ?= out
# An environment with the oldest host libraries that pyproject.toml allows.
LOWEST := $(VENV)-lowest
# Two workers: the tests of models run on one thread each. They begin with a half of the tests each, in order, so that
# what a file's tests share is mostly made once.
PYTEST_ARGS ?= -n 2 --dist worksteal

# Without a working GPU only the CPU kernels are built; with one, whatever the compilers found allow.
export HF_ACTNN_BUILD ?= $(shell nvidia-smi >/dev/null 2>&1 && echo auto || echo cpu)

NATIVE := $(wildcard setup.py csrc/*.cpp csrc/*.h csrc/*.cuh csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
CPP := $(filter %.cpp %.h %.cu %.cuh,$(NATIVE)) $(wildcard tests/cuda/*.cpp tests/cuda/*.h)

.PHONY: help demo test check bench versions gpu clean

help:  ## what there is
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

$(VENV)/.torch: constraints.txt tools/torchvision_without_cuda.py tools/requirements.py
	test -x $(PYTHON) || $(SYSTEM_PYTHON) -m venv $(VENV)
	@echo "Installing torch and the build tools into $(VENV)"
	# torch first and pinned: a resolver that starts from torchvision may choose another torch, gigabytes of it.
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) -c constraints.txt $$($(PYTHON) tools/requirements.py --build)
	$(PYTHON) tools/torchvision_without_cuda.py
	touch $@

$(VENV)/.libraries: $(VENV)/.torch pyproject.toml
	@echo "Installing transformers, timm and what the examples need"
	$(PIP) -c constraints.txt $$($(PYTHON) tools/requirements.py timm data hf plots) psutil
	touch $@

$(VENV)/.tools: $(VENV)/.libraries
	@echo "Installing the test, lint and documentation tools"
	$(PIP) -c constraints.txt $$($(PYTHON) tools/requirements.py dev docs)
	touch $@

$(VENV)/.package: $(VENV)/.torch pyproject.toml $(NATIVE)
	@echo "Building hf_actnn (HF_ACTNN_BUILD=$(HF_ACTNN_BUILD))"
	$(PIP) --no-build-isolation --no-deps --editable .
	touch $@

# The extension is compiled while the libraries are installed. Goals of one call come one after the other, also where
# make was told to do several things at once: two of them would install into one environment.
ifeq ($(MAKELEVEL),0)
.NOTPARALLEL:
endif
together = @+$(MAKE) --no-print-directory --silent --jobs=2 $(VENV)/.package $(VENV)

demo:  ## train two models on real images, uncompressed and at L2: a table and a picture
	$(together)/.libraries
	$(PYTHON) examples/demo/demo.py --out demo

test:  ## every test that needs no GPU
	$(together)/.tools
	$(PYTHON) -m pytest -m "not gpu" $(PYTEST_ARGS)

check:  ## formatting, lint, types, import layers, documentation
	$(together)/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(CPP),$(BIN)/clang-format --dry-run -Werror $(CPP))
	$(BIN)/mypy
	$(PYTHON) -m pytest -q tests/test_layers.py
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet --site-dir $(VENV)/site

bench:  ## every benchmark; results as JSON in benchmarks/results
	$(together)/.tools
	failed=; for file in benchmarks/*.py; do \
	  grep -q '__main__' $$file || continue; \
	  if grep -q '"--device"' $$file; then echo "== $$file: left out, docs/gpu.md says how to run it"; continue; fi; \
	  echo "== $$file"; $(PYTHON) $$file || failed="$$failed $$file"; \
	done; test -z "$$failed" || { echo "== did not end well:$$failed"; exit 1; }

versions: constraints.txt  ## tests of the integrations with the oldest transformers, accelerate and timm that are allowed
	test -x $(LOWEST)/bin/python || $(SYSTEM_PYTHON) -m venv $(LOWEST)
	# What the host libraries decide by themselves is not pinned.
	grep -vE '^(timm|transformers|accelerate|huggingface_hub|tokenizers)==' constraints.txt > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(LOWEST)/bin/pip install --quiet -c $(LOWEST)/constraints.txt $$($(LOWEST)/bin/python tools/requirements.py --build) \
	  $$($(LOWEST)/bin/python tools/requirements.py --lowest dev)
	$(LOWEST)/bin/python tools/torchvision_without_cuda.py
	$(LOWEST)/bin/pip install --quiet --no-build-isolation --no-deps --editable .
	$(LOWEST)/bin/python -m pytest -m "not gpu" $(PYTEST_ARGS) tests/integrations

gpu:  ## on a machine with a GPU, with the Python that is there and nothing installed: build, test, measure into $OUT
	tools/gpu.sh "$(SYSTEM_PYTHON)" "$(OUT)"

clean:  ## remove what was built, but not .venv
	rm -rf build dist site out demo *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find hf_actnn -name '*.so' -delete
	rm -f $(VENV)/.package
