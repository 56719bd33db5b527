# engram: `make demo` shows everything, `make test` checks everything. Both set up what they need in .venv first.
# A GPU build of torch: make setup TORCH=torch==2.13.0 (then PyPI's build for your platform is taken).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

TORCH ?= torch==$(TORCH_VERSION)$(if $(filter Darwin,$(shell uname -s)),,+cpu)
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
INSTALL := $(PIP) install -qq --root-user-action ignore -c constraints.txt

.PHONY: help demo test setup setup-dev kernels docs bench targets gguf clean

help: ## what can be made
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' $(MAKEFILE_LIST) | expand -t 20

demo: setup ## the whole path on a real model: corpus, memory, table on disk, text (15 minutes on two cores)
	$(BIN)/engram demo

test: setup-dev ## ruff, mypy --strict and every test
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q

docs: setup ## write docs/cli.md again from the live --help
	$(BIN)/python -m engram.cli.help docs/cli.md

bench: setup ## the benchmarks on a corpus of yours: make bench CORPUS="folder more.jsonl"
	@[ -n "$(CORPUS)" ] || { echo 'error: no corpus to measure on; hint: make bench CORPUS="folder more.jsonl"' >&2; exit 1; }
	$(BIN)/python benchmarks/tokenize_throughput.py $(CORPUS) --tokenizer \
		"$$($(BIN)/python -c 'from engram.builders.fetch import DEEPSEEK_V3_TOKENIZER as t; print(t.fetch())')"

targets: setup ## what rows, hashing and decoding reach, beside the peers that are installed (15 minutes, 4 GB of memory and of disk)
	$(BIN)/python benchmarks/targets.py --plot benchmarks/results/rows.png

gguf: setup ## llama-cpp-python, compiled once from source; the wheel is kept in .cache/wheels
	@command -v c++ >/dev/null || { echo "error: no C++ compiler; hint: apt-get install build-essential cmake" >&2; exit 1; }
	@ls .cache/wheels/llama_cpp_python-*.whl >/dev/null 2>&1 || { echo "compiling llama.cpp: 10 to 40 minutes, once"; \
		$(PIP) wheel --quiet --no-deps -w .cache/wheels -c constraints.txt llama-cpp-python; }
	$(INSTALL) --find-links .cache/wheels -e '.[gguf]'

clean: ## remove the environment and every cache in the checkout (not ~/.cache/engram)
	rm -rf .venv .cache build .mypy_cache .pytest_cache .ruff_cache .hypothesis

kernels: setup ## the C++ extension again, in place, after an edit of kernels/csrc (seconds)
	$(PIP) install -q -c constraints.txt nanobind cmake ninja
	$(BIN)/cmake -S kernels -B build/dev -G Ninja -DPython_EXECUTABLE=$(abspath $(BIN)/python) >/dev/null
	$(BIN)/cmake --build build/dev && cp build/dev/_C*.so "$$($(BIN)/python -c 'import engram.kernels._C as c; print(c.__file__)')"

setup: .venv/.ready ## the environment: CPU torch first, then engram
setup-dev: .venv/.ready-dev ## the same with the tools that `make test` needs

.venv/bin/python:
	@[ -n "$(PYTHON)" ] || { echo "error: no Python 3.11 or newer found (python3 is $$(python3 -V 2>&1)); hint: install one, or name it: make setup PYTHON=/path/to/python3.12" >&2; exit 1; }
	@if $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then $(PYTHON) -m venv --prompt engram .venv; \
	elif $(PYTHON) -m pip --version >/dev/null 2>&1; then \
		echo "setup: $(PYTHON) has no ensurepip; borrowing its pip"; \
		$(PYTHON) -m venv --without-pip --prompt engram .venv && $(PYTHON) -m pip --python .venv/bin/python install --quiet pip \
			|| { rm -rf .venv; echo "error: pip could not be put into .venv; hint: check the network, then run this again" >&2; exit 1; }; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "setup: $(PYTHON) has no venv; you are root, so: apt-get install python3-venv"; \
		apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null && $(PYTHON) -m venv --prompt engram .venv; \
	else echo "error: $(PYTHON) cannot make virtual environments; hint: apt-get install python3-venv, then run this again" >&2; exit 1; fi

KERNELS := kernels/CMakeLists.txt $(wildcard kernels/csrc/*.cpp kernels/csrc/*.h kernels/csrc/isa/*.cpp)

.venv/.ready: pyproject.toml constraints.txt $(KERNELS) | .venv/bin/python
	@echo "setup: $$($(BIN)/python -V), $(TORCH) and engram into .venv (1 to 5 minutes, about 2 GB)"
	@began=$$SECONDS; \
	$(INSTALL) --no-deps '$(TORCH)' 2>/dev/null \
		|| { echo "setup: $(TORCH) is not on the configured index; taking it from $(TORCH_INDEX)"; \
		     $(INSTALL) --no-deps --index-url $(TORCH_INDEX) '$(TORCH)'; } \
		|| { echo "error: $(TORCH) (the CPU build) could not be installed; hint: make setup TORCH_INDEX=<an index that has it>, or TORCH=torch==$(TORCH_VERSION) for PyPI's build (on Linux with CUDA, several GB)" >&2; exit 1; }; \
	echo "setup: torch is there after $$((SECONDS - began)) s"; \
	$(INSTALL) -e .; \
	echo "setup: kernels $$($(BIN)/python -c 'from engram.kernels import dispatch; print(dispatch.name())')"; \
	echo "setup: done in $$((SECONDS - began)) s"
	@touch $@

.venv/.ready-dev: .venv/.ready
	@began=$$SECONDS; $(INSTALL) -e '.[dev]'; echo "setup: dev tools in $$((SECONDS - began)) s"
	@touch $@
