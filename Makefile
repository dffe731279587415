# Every target makes the virtual environment it needs and is safe to run again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The oldest Triton that the package allows, without torch: the tests compile the kernels with it. It shares the tree,
# and any unigendet/_C there, with $(VENV).
OLDEST_TRITON := $(VENV)/triton-oldest
# torch-fidelity and the torchvision that it imports, for one test, in a folder of their own: beside another build of
# PyTorch torchvision does not load, and transformers and diffusers then do not either.
FID_LIBRARIES := $(VENV)/fid-libraries
# The GPU machine's own Python, with its own torch, triton, pytest, pybind11, ninja and setuptools (77 or later):
# `make gpu` takes nothing from the network. The benchmarks run even if a test fails, and begin nothing new when their
# time is over: whatever is left is listed as such.
GPU_PYTHON ?= python3
GPU_LOG := runs/gpu.log
# Of each of four processes, so that a kernel that hangs or breaks the device costs the results of its own only.
GPU_SECONDS ?= 80
GPU_TIMEOUT ?= 110

.PHONY: help install prepare test sanitize lint format quickstart gpu clean

help:  ## Show the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,dev]'
	touch $@

$(OLDEST_TRITON)/.installed: $(INSTALLED) constraints-triton-oldest.txt
	test -x $(OLDEST_TRITON)/bin/python || $(PYTHON) -m venv $(OLDEST_TRITON)
	$(OLDEST_TRITON)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-triton-oldest.txt triton
	UNIGENDET_EXTENSION=off $(OLDEST_TRITON)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

$(FID_LIBRARIES)/.installed: $(INSTALLED) constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps --upgrade --target $(FID_LIBRARIES) torch-fidelity torchvision
	touch $@

install: $(INSTALLED)  ## Create .venv and install the package with all extras

# The C++ sources under the sanitizers of the compiler, in a program without Python.
SANITIZED := build/sanitize
SANITIZE_FLAGS := -std=c++17 -O1 -g -ffp-contract=fast -fopenmp -Wall -Wextra -Werror -Wno-psabi \
	-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
SANITIZE_LEVELS := baseline
ifeq ($(shell uname -m),x86_64)
SANITIZE_FLAGS += -DUNIGENDET_X86_LEVELS
SANITIZE_LEVELS += x86_64_v3 x86_64_v4
$(SANITIZED)/x86_64_v3/%.o: LEVEL_FLAGS := -mavx2 -mfma -mf16c
$(SANITIZED)/x86_64_v4/%.o: LEVEL_FLAGS := -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c
endif

SANITIZE_SOURCES := alignment_loss_cpu qk_norm_rope_cpu rms_norm_cpu swiglu_cpu symbiotic_attention_cpu \
	symbiotic_attention_backward_cpu
SANITIZE_OBJECTS := $(foreach level,$(SANITIZE_LEVELS),$(SANITIZE_SOURCES:%=$(SANITIZED)/$(level)/%.o))
SANITIZE_OBJECTS += $(SANITIZED)/attention_plan.o
SANITIZE_PROGRAMS := $(SANITIZED)/fuzz_alignment_loss $(SANITIZED)/fuzz_attention $(SANITIZED)/fuzz_rows

define SANITIZE_RULE
$(SANITIZED)/$(1)/%.o: csrc/%.cpp $(wildcard csrc/*.h csrc/*.cuh)
	mkdir -p $$(@D)
	$$(CXX) $$(SANITIZE_FLAGS) $$(LEVEL_FLAGS) -DUNIGENDET_ISA=$(1) -c $$< -o $$@
endef
$(foreach level,$(SANITIZE_LEVELS),$(eval $(call SANITIZE_RULE,$(level))))

$(SANITIZED)/attention_plan.o: csrc/attention_plan.cpp csrc/attention_plan.h csrc/params.h
	mkdir -p $(@D)
	$(CXX) $(SANITIZE_FLAGS) -c $< -o $@

$(SANITIZED)/fuzz_%: tests/csrc/fuzz_%.cpp $(SANITIZE_OBJECTS) $(wildcard tests/csrc/*.h)
	$(CXX) $(SANITIZE_FLAGS) $(filter %.cpp %.o,$^) -o $@

.SECONDARY: $(SANITIZE_OBJECTS)
sanitize: $(SANITIZE_PROGRAMS)  ## Run the C++ sources on random inputs under sanitizers
	for program in $^; do OMP_WAIT_POLICY=passive $$program || exit 1; done

prepare: $(INSTALLED) $(OLDEST_TRITON)/.installed $(FID_LIBRARIES)/.installed $(SANITIZE_PROGRAMS)  ## Make all that the tests need (with -j2: at once)

test: export UNIGENDET_OLDEST_TRITON_PYTHON := $(CURDIR)/$(OLDEST_TRITON)/bin/python
test: export UNIGENDET_FID_LIBRARIES := $(CURDIR)/$(FID_LIBRARIES)
test: prepare sanitize  ## Run the tests that need no GPU
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -m 'not gpu' --numprocesses 2 --dist worksteal

lint: $(INSTALLED)  ## Check the code's style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)  ## Put the code in the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quickstart: $(INSTALLED)  ## Train, generate, detect and report on handwritten digits, on the CPU
	$(BIN)/unigendet quickstart --out quickstart

gpu: SHELL := /bin/bash
gpu: .SHELLFLAGS := -o pipefail -c
gpu:  ## Run the tests and benchmarks that need a GPU; leaves benchmarks/results/ and runs/gpu.log
	UNIGENDET_CUDA=on $(GPU_PYTHON) -m pip install --quiet --disable-pip-version-check --no-index --no-build-isolation --no-deps --editable .
	mkdir -p $(dir $(GPU_LOG))
	{ status=0; \
	$(GPU_PYTHON) -m pytest -m gpu -q || status=$$?; \
	for ops in "decoder_layer training_step packing_cost" attention \
	"alignment_loss qk_norm_rope rms_norm swiglu stream_linear flow_matching" scaling; do \
	timeout --kill-after 20 $(GPU_TIMEOUT) $(GPU_PYTHON) -m unigendet bench --device cuda --record --limit $(GPU_SECONDS) --op $$ops || status=$$?; \
	done; \
	exit $$status; } 2>&1 | tee $(GPU_LOG)

clean:  ## Remove the virtual environment and what the targets left
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis quickstart unigendet/_C*.so
