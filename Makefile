# demo, test, lint and bench set up everything in .venv on their first call; later calls start at once.
# gpu uses the current python3 with the torch it has, and installs nothing from a network.

PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc -type f)
PIP := $(BIN)/python -m pip --disable-pip-version-check

# make gpu: PART is all, ops, engines or one of their parts, or a folder of tests; OUT takes the JSON rows. DEVICE=cpu TINY=1
# PYTHON=.venv/bin/python shows without a GPU that the parts run.
PART ?= all
OUT ?= build/gpu
DEVICE ?= cuda
TINY ?=
K ?=
# Kernels are compiled in the tests' processes, so several finish sooner where pytest-xdist is. Interrupted in time, pytest still
# tells what failed.
PYTEST ?= $(shell $(PYTHON) -c "import importlib.util as i; print('-n 8 --dist worksteal' if i.find_spec('xdist') and '$(DEVICE)' == 'cuda' else '')")
SECONDS_test ?= 570
CAPABILITY ?= $(shell $(PYTHON) -c "import torch; print('%d%d' % torch.cuda.get_device_capability())")
MINUTES ?= 5
PARTS_ops := ops-test ops-bench ops-sanitize
PARTS_data := data_layer-test data-bench data-pipeline
PARTS_engines := engines-test engines-adm engines-dit
PARTS_all := all-test projection-bench ops-bench ops-sanitize engines-adm engines-dit data-bench data-pipeline

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint bench gpu gpu-install gpu-projection-bench gpu-projection-eager gpu-projection-inductor gpu-ops-bench gpu-ops-sanitize gpu-engines-adm gpu-engines-dit gpu-data-bench gpu-data-pipeline clean

help:
	@echo "make demo   both stages of SDA on real photographs: table, pictures, HTML report"
	@echo "make test   all tests that need no GPU"
	@echo "make lint   ruff, mypy, clang-format"
	@echo "make bench  cost of a projected patch and of every operator on this CPU; rows and plots in build/bench"
	@echo "make gpu    [PART=ops|engines|data|ops-test|...|all] [OUT=folder] tests and benchmarks on this machine's GPU;"
	@echo "            [K=words] of the tests those that pytest -k selects; [MINUTES=5] after which no measurement begins"
	@echo "make venv   only set up .venv (PYTHON=python3.12 chooses the interpreter)"
	@echo "make clean  remove what was built"

venv: .venv/.installed

# The build tools stay in .venv: rebuilding after an edit in csrc takes seconds and needs no network.
# setuptools is for dependencies that publish no wheel (grad-cam): they are built without isolation, too.
.venv/.tools:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'sda_fast needs Python 3.11 or newer; choose one with make PYTHON=...')"
	@echo "Setting up .venv: several minutes the first time, PyTorch alone is about 2 GB."
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet --upgrade pip "scikit-build-core>=0.10" "pybind11>=2.13" "cmake>=3.24" ninja "setuptools>=77"
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
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -type f) tests/ops/emulator/*.h tests/ops/emulator/*.cu

# Every script of benchmarks/, also after one has failed.
run_benchmarks = status=0; for script in benchmarks/bench_*.py; do $(1) $$script $(2) || status=1; done; exit $$status

bench: venv
	@rm -f build/bench/*.jsonl
	$(BIN)/sda-fast bench --whole
	@$(call run_benchmarks,$(BIN)/python,--repeats 10 --seconds 3 --output build/bench)
	@$(BIN)/python benchmarks/plot.py build/bench

# The package is run from where it is installed, never from its source folder, which lacks the compiled module: -P.
# The variable lets all of PyTorch be deterministic, as the command sda-fast does.
gpu: export CUBLAS_WORKSPACE_CONFIG ?= :4096:8
gpu: gpu-install
	@mkdir -p $(OUT)
	$(MAKE) --no-print-directory --keep-going $(addprefix gpu-,$(or $(PARTS_$(PART)),$(if $(filter %-test %-bench %-sanitize %-adm %-dit %-pipeline %-eager %-inductor,$(PART)),$(PART),$(PART)-test)))

gpu-install:
ifeq ($(DEVICE),cuda)
	@$(PYTHON) -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'torch finds no NVIDIA GPU here')"
	@echo "Compiling for this GPU alone (sm_$(CAPABILITY))."
	$(PYTHON) -m pip install --quiet --no-index --no-build-isolation --no-deps --config-settings=build-dir=build/gpu-wheel --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES=$(CAPABILITY) .
endif

gpu-%-test:
	timeout -s INT $(SECONDS_test) $(PYTHON) -P -m pytest -m gpu $(if $(K),-k "$(K)") $(PYTEST) --durations 5 tests/$(filter-out all,$*)

# Two targets, so that the second runs where the first fails.
gpu-projection-bench: gpu-projection-eager gpu-projection-inductor

gpu-projection-eager gpu-projection-inductor: gpu-projection-%:
	$(PYTHON) -P -m sda_fast bench --whole $(PROJECTION_$*) $(if $(TINY),--batch 2 --repeats 1) --device $(DEVICE) --json > $(OUT)/projection-$*.json

PROJECTION_inductor = --engine inductor --precision bf16 --batch 40

gpu-data-bench:
	$(PYTHON) benchmarks/decode.py --device $(DEVICE) $(if $(TINY),--images 32 --repeats 1) --output $(OUT)

# Goes on in the next call as well: weights (5.4 GB) and images stay in build/pipeline.
gpu-data-pipeline:
	$(PYTHON) benchmarks/pipeline.py --device $(DEVICE) $(if $(TINY),--tiny --engine eager --images 4 --batch-size 2) --output $(OUT)

gpu-ops-bench:
	@$(call run_benchmarks,$(PYTHON),--device $(DEVICE) $(if $(TINY),--tiny) --output $(OUT))

gpu-ops-sanitize:
	$(PYTHON) benchmarks/sanitize.py --device $(DEVICE)

# What a call leaves undone after MINUTES, it names; the next call goes on.
gpu-engines-adm gpu-engines-dit: gpu-engines-%:
	$(PYTHON) benchmarks/engines.py --model $* --device $(DEVICE) $(if $(TINY),--tiny) --minutes $(MINUTES) --output $(OUT)

clean:
	rm -rf build dist .venv/.installed .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +
