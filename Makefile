# Paths are relative throughout, so a space in the folder's name does no harm.
PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
BUILD_INPUTS := pyproject.toml setup.py constraints.txt $(wildcard csrc/* csrc/*/*)

.PHONY: help env demo test asan lint bench gpu clean
help:
	@echo "make env    create .venv and install the pinned packages and this one (editable) into it"
	@echo "make demo   train a small super-network and its core, print the table"
	@echo "make test   run the test suite"
	@echo "make asan   run the compiled kernels' tests, emulated CUDA too, with sanitizers"
	@echo "make lint   ruff check, ruff format --check, pyright"
	@echo "make bench  run the benchmarks, keep their figures in bench/results"
	@echo "make gpu    on a CUDA device: build, test and time its kernels, in under ten minutes;"
	@echo "            RESULTS=folder for its figures, DRY=1 to go through it on the CPU, in small"
	@echo "make clean  remove what was built; .venv stays"

env: .venv/.installed

.venv/.installed: $(BUILD_INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	    "constraints.txt needs Python 3.11 or newer: make env PYTHON=python3.12")'
	@test -x $(PY) || { echo "env: creating .venv"; $(PYTHON) -m venv .venv; }
	@echo "env: installing torch and the build tools"
	@$(PIP) torch numpy ninja pybind11 setuptools wheel
	@echo "env: installing this package, editable, with its extras data, text, plot, dev"
	@$(PIP) --no-build-isolation --editable ".[data,text,plot,dev]"
	@$(PY) -c 'from partial_kernels._native import native_status as s; \
	    print("env: compiled kernels:", s().reason or s().info)'
	@touch $@

demo: env
	.venv/bin/maskedtrain demo

# One thread for each of the workers: more would fight over the cores. The second session has what
# runs GPU kernels on the CPU: Triton's interpreter, and CUDA's device language in C++.
WORKERS := --numprocesses auto --maxprocesses 8 --dist loadfile
EMULATED := build/emulated/_C_cuda.so
$(EMULATED): env $(wildcard csrc/cuda/* csrc/common/*.h tests/emulated/*)
	$(PY) -m tests.emulated.build $@
test: env $(EMULATED)
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not gpu" $(WORKERS)
	TRITON_INTERPRET=1 PARTIAL_KERNELS_EMULATED=$(EMULATED) OMP_NUM_THREADS=1 \
	    $(PY) -m pytest tests/interpret tests/emulated $(WORKERS)

# Builds of their own beside the usual ones; Python itself, which is not instrumented, leaks by
# design.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined
SANITIZED := LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) \
    $$($(CXX) -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2
asan: env
	CXXFLAGS="$(SANITIZE) -g1" LDFLAGS="$(SANITIZE)" PARTIAL_KERNELS_BUILD=require \
	    $(PY) setup.py --quiet build --build-lib build/asan
	CXXFLAGS="$(SANITIZE) -g1" LDFLAGS="$(SANITIZE)" \
	    $(PY) -m tests.emulated.build build/asan/emulated/_C_cuda.so
	$(SANITIZED) $(PY) -m pytest tests/native --override-ini=pythonpath=build/asan
	$(SANITIZED) PARTIAL_KERNELS_EMULATED=build/asan/emulated/_C_cuda.so \
	    $(PY) -m pytest tests/emulated --override-ini=pythonpath=build/asan $(WORKERS)

lint: env
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(PY) -m pyright

bench: env
	$(PY) -m pytest bench --benchmark-only --results bench/results

# For a machine as it is, which may have no network: its own Python, unless there is a .venv.
RESULTS ?= $(if $(DRY),build/dry-run,bench/results)
gpu:
	$(or $(wildcard $(PY)),$(PYTHON)) -m bench.gpu --results $(RESULTS) $(if $(DRY),--dry-run)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks .venv/.installed
	rm -f partial_kernels/_C*
