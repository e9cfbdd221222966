# Every target does all that it needs by itself, in .venv; a second run starts in seconds.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
    $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
TORCH_VERSION ?= 2.13.0
TORCHREC_NEEDS := fbgemm-gpu-cpu pyre-extensions tensordict torchmetrics tqdm
VENV := .venv
RUN := $(VENV)/bin
# torch compiles the engine's files side by side where it finds ninja.
WITH_NINJA := PATH="$(CURDIR)/$(RUN):$$PATH"
CSRC := $(shell find csrc -type f 2>/dev/null)
CXX_FILES := $(filter %.cpp %.h %.cu %.cuh,$(CSRC) $(shell find tests -type f))
SWEEP_METHODS ?= full,hash,qr,low_dim,low_bit
SWEEP_DATA ?= synthetic:rows=100000
SWEEP_OUT ?= sweep-results/synthetic

.DEFAULT_GOAL := help
.PHONY: help setup sweep test test-slow check format sanitize emulate gpu benchmark clean

help: ## show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.installed $(VENV)/.torchrec ## a virtual environment with torch and everything else

$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.10 found; set PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# A machine with an NVIDIA driver gets the CUDA build of torch. Others try the CPU build first:
# point pip at PyTorch's index of CPU wheels to save some gigabytes.
$(VENV)/.torch: $(VENV)/.python
	@if command -v nvidia-smi >/dev/null 2>&1; then \
	    $(RUN)/pip install -q "torch==$(TORCH_VERSION)"; \
	else \
	    $(RUN)/pip install -q "torch==$(TORCH_VERSION)+cpu" 2>/dev/null \
	        || $(RUN)/pip install -q "torch==$(TORCH_VERSION)"; \
	fi
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py constraints.txt $(CSRC)
	$(RUN)/pip install -q -c constraints.txt "setuptools>=77" wheel ninja
	$(WITH_NINJA) $(RUN)/pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	@$(RUN)/python -c "from embcompress.engine import ops; print('The compiled CPU engine is built.' \
	    if ops.is_available() else 'No C++ compiler was found: lookups run in pure torch.')"
	@touch $@

# TorchRec asks for fbgemm-gpu by name, where fbgemm-gpu-cpu does as well: hence --no-deps. It goes
# with one version of torch (docs/torchrec.md), and everything else works without it.
$(VENV)/.torchrec: $(VENV)/.installed
	@{ $(RUN)/pip install -q -c constraints.txt $(TORCHREC_NEEDS) \
	    && $(RUN)/pip install -q -c constraints.txt --no-deps torchrec \
	    && $(RUN)/python -W ignore -c "import torchrec"; } >$(VENV)/torchrec.log 2>&1 \
	    || { $(RUN)/pip uninstall -q -y torchrec fbgemm-gpu-cpu >/dev/null 2>&1; \
	        echo "note: TorchRec was not installed ($(VENV)/torchrec.log), its tests are skipped;" \
	            "remove $@ to try again"; }
	@touch $@

sweep: setup ## which of the methods loses least, on the synthetic click log, in minutes
	$(RUN)/embcompress sweep --data $(SWEEP_DATA) --methods $(SWEEP_METHODS) \
	    --budgets 50%,10%,1% --seeds 0 --out $(SWEEP_OUT)

test: setup ## the tests, in parallel
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: setup ## large and long tests
	$(RUN)/python -m pytest -m slow

check: setup ## lint, types and formatting
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	@if [ -n "$(CXX_FILES)" ]; then $(RUN)/clang-format --dry-run -Werror $(CXX_FILES); fi

format: setup ## format Python and C++ files
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .
	@if [ -n "$(CXX_FILES)" ]; then $(RUN)/clang-format -i $(CXX_FILES); fi

# Leaks are left out: the interpreter never frees what it holds at its end.
sanitize: setup ## the engine's tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(WITH_NINJA) EMBCOMPRESS_SANITIZE=1 EMBCOMPRESS_BUILD_EXTENSION=1 \
	    $(RUN)/python setup.py -q build_ext --build-lib .sanitize/lib --build-temp .sanitize/temp
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	    EMBCOMPRESS_LIBRARY=.sanitize/lib/embcompress/_C.abi3.so OMP_NUM_THREADS=2 \
	    $(RUN)/python -m pytest -n 2 -m "not slow" \
	    tests/engine tests/test_optimizers.py tests/test_collection.py

emulate: setup ## the engine's tests through the CUDA kernels, whose launches are emulated on the CPU
	OMP_NUM_THREADS=1 EMBCOMPRESS_LIBRARY="$$($(RUN)/python -m tests.cuda.emulation.build)" \
	    $(RUN)/python -m pytest -n 2 -m "not slow" --deselect \
	    tests/engine/test_generated.py::test_the_number_of_threads_changes_no_bit \
	    tests/engine tests/test_optimizers.py tests/test_collection.py

gpu: ## on a machine with a GPU: build, test, sanitize and measure, with the python3 that has torch
	PYTHON=$(or $(PYTHON),python3) benchmarks/gpu.sh

benchmark: setup ## lookups and training steps, ours against the full table (needs an idle machine)
	$(RUN)/python benchmarks/lookup.py --out benchmark-results/lookup
	$(RUN)/python benchmarks/train_step.py --out benchmark-results/train_step

clean: ## remove the environment and everything built
	rm -rf $(VENV) build .sanitize *.egg-info embcompress/*.so
