# demo, test, lint and bench set up everything in .venv on their first call; later calls start at once.
# gpu uses the current python3 with the torch it has, and installs nothing from a network.

PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc -type f)
PIP := $(BIN)/python -m pip --disable-pip-version-check

# make gpu: PART=all or the name of a folder of tests (ops, ...); OUT takes the JSON rows.
PART ?= all
OUT ?= build/gpu

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint bench gpu clean

help:
	@echo "make demo   both stages of SDA on real photographs: table, pictures, HTML report"
	@echo "make test   all tests that need no GPU"
	@echo "make lint   ruff, mypy, clang-format"
	@echo "make bench  cost of a projected patch, eager reference against Projector"
	@echo "make gpu    [PART=ops|all] [OUT=folder] tests and benchmarks on this machine's GPU"
	@echo "make venv   only set up .venv (PYTHON=python3.12 chooses the interpreter)"
	@echo "make clean  remove what was built"

venv: .venv/.installed

# The build tools stay in .venv: rebuilding after an edit in csrc takes seconds and needs no network.
.venv/.tools:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'sda_fast needs Python 3.11 or newer; choose one with make PYTHON=...')"
	@echo "Setting up .venv: several minutes the first time, PyTorch alone is about 2 GB."
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet --upgrade pip "scikit-build-core>=0.10" "pybind11>=2.13" "cmake>=3.24" ninja
	@touch $@

.venv/.installed: $(SOURCES) | .venv/.tools
	$(PIP) install --quiet --no-build-isolation --config-settings=build-dir=build/editable --config-settings=cmake.define.CMAKE_COMPILE_WARNING_AS_ERROR=ON --editable ".[dev]"
	@touch $@

demo: venv
	$(BIN)/sda-fast demo

test: venv
	$(BIN)/pytest -m "not gpu" -n auto --dist worksteal

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -type f)

bench: venv
	$(BIN)/sda-fast bench --preset photos

# pytest by its script, not `python -m pytest`, which would import the source tree instead of the installed package.
gpu: SCRIPTS = $(shell $(PYTHON) -c "import sysconfig; print(sysconfig.get_path('scripts'))")
gpu:
	@$(PYTHON) -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'torch finds no NVIDIA GPU here')"
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps .
	mkdir -p $(OUT)
	$(SCRIPTS)/pytest -m gpu tests/$(if $(filter all,$(PART)),,$(PART))
	$(SCRIPTS)/sda-fast bench --preset photos --device cuda --json > $(OUT)/bench.json

clean:
	rm -rf build dist .venv/.installed .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +
