# The two commands: `make quickstart` and `make test`. Variables: PYTHON=python3.12, PIP_ARGS="--extra-index-url ..."
# Everything lives in .venv; its stamp files make a second call quick.

PYTHON ?= python3
PIP_ARGS ?=
RUN_ARGS ?=
TEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
RUN_READY := $(VENV)/.sparring-run
DEV_READY := $(VENV)/.sparring-dev
INSTALL_LOG := $(VENV)/install.log
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
LINTED := sparring tests benchmarks quickstart

.PHONY: help quickstart test test-slow test-gpu check format bench golden check-kernels policy clean

help:
	@echo "make quickstart      train the small policy that ships with the project, on the CPU, in minutes"
	@echo "make test            run the tests"
	@echo "make check           lint, format check and types"
	@echo "make format          mend lint and format"
	@echo "make test-slow       tests that take minutes        make test-gpu       tests that need a GPU"
	@echo "make bench           the committed benchmarks       make check-kernels  kernels interpreted and compiled"
	@echo "make policy          make the quickstart policy     make golden         compare bits with a commit (REV=...)"
	@echo "make clean           remove caches and build files (runs/ and .venv stay)"

# The run before is kept as runs/quickstart.previous; nothing else is touched.
quickstart: $(RUN_READY)
	@if [ -d runs/quickstart ]; then rm -rf runs/quickstart.previous && mv runs/quickstart runs/quickstart.previous; fi
	@$(BIN)/sparring grpo quickstart --run.dir runs/quickstart $(RUN_ARGS)

test: $(DEV_READY)
	$(PYTEST) -n 2 $(TEST_ARGS)

test-slow: $(DEV_READY)
	$(PYTEST) -m "slow and not gpu" $(TEST_ARGS)

test-gpu: $(DEV_READY)
	$(PYTEST) -m gpu $(TEST_ARGS)

check: $(DEV_READY)
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/mypy

format: $(DEV_READY)
	$(BIN)/ruff check --fix $(LINTED)
	$(BIN)/ruff format $(LINTED)

bench: $(DEV_READY)
	$(BIN)/python benchmarks/cpu_step.py
	$(BIN)/python benchmarks/quickstart.py

golden: $(DEV_READY)
	$(BIN)/python benchmarks/golden.py $(REV)

check-kernels: $(DEV_READY)
	TRITON_INTERPRET=1 $(PYTEST) -n 2 tests/kernels/test_triton*.py -m "not gpu" $(TEST_ARGS)
	$(PYTEST) -n 2 tests/kernels/test_compile*.py tests/kernels/test_every_kernel.py -m "not gpu" $(TEST_ARGS)

policy: $(DEV_READY)
	$(BIN)/python -m quickstart.make

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
	  echo "error: there is no '$(PYTHON)' here; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1), and Sparring needs 3.11 or newer; name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "error: $(PYTHON) comes without its venv module; on Debian and Ubuntu: sudo apt-get install python3-venv, then again" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version 2>&1)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: $(PYTHON) could not make $(VENV) (see above); on Debian and Ubuntu: sudo apt-get install python3-venv, then again" >&2; exit 1; }

$(RUN_READY): $(VENV)/bin/python pyproject.toml constraints.txt
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(VENV) holds $$($(BIN)/python --version 2>&1), and Sparring needs 3.11 or newer; remove $(VENV), then call make again" >&2; exit 1; }
	@echo "installing what a run needs into $(VENV); the first time this takes minutes"
	@$(call install,--editable .)
	@touch $@

$(DEV_READY): $(RUN_READY)
	@echo "installing what tests and checks need"
	@$(call install,--editable '.[dev]')
	@touch $@

# What pip complains of goes to a log, and one message says what to do.
install = $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt $(PIP_ARGS) $(1) 2>$(INSTALL_LOG) || { \
	if grep -q -i -E 'connection|resolution|timed out|proxy|unreachable|no matching distribution' $(INSTALL_LOG); then \
	  echo "error: pip cannot reach its packages. Connect this machine to the network, or name a mirror or a folder of wheels: make PIP_ARGS='--index-url URL' or make PIP_ARGS='--no-index --find-links DIR'. All that pip said: $(INSTALL_LOG)" >&2; \
	else \
	  echo "error: pip could not install the dependencies: $$(grep -i error $(INSTALL_LOG) | tail -n 1). All that pip said: $(INSTALL_LOG). Mend that, then call make again" >&2; \
	fi; exit 1; }
