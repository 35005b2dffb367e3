# make demo   fit real data and draw the picture        make test   the whole test suite
# make lint   ruff, mypy and the docstrings             make bench-env   the peers to measure against
# make test-legate   cuPyNumeric on two CPUs and on two ranks; downloads 4 GB of wheels on first use
#
# Every command is printed as it runs; each works typed by hand as well. The virtual environment is
# made on first use and again when pyproject.toml changes. Another Python: make test PYTHON=python3.13

PYTHON ?= python3
VENV := .venv
BENCH_VENV := .venv-bench
BIN := $(VENV)/bin
PIP_FLAGS := -qq --disable-pip-version-check
# One BLAS thread per test process: two processes on two cores do better than four threads.
TEST_ENV := OMP_NUM_THREADS=1
TEST_FLAGS ?= -n 2 --timeout 600

.PHONY: demo test lint test-legate bench-env clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

test: $(VENV)/.test
	$(TEST_ENV) $(BIN)/python -m pytest $(TEST_FLAGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python .ci/docstrings.py

test-legate:
	PYTHON=$(PYTHON) bash scripts/test-legate.sh

bench-env: $(BENCH_VENV)/.ready
	@echo "The peers are ready: $(BENCH_VENV)/bin/python benchmarks/small_fits.py"

clean:
	rm -rf $(VENV) $(VENV)-* build dist out .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The demo needs NumPy, SciPy and Matplotlib only; the tests add PyTorch and the rest on top.
$(VENV)/.demo: $(VENV)/.made pyproject.toml
	$(BIN)/python -m pip install $(PIP_FLAGS) --editable ".[plot]"
	@touch $@

$(VENV)/.test: $(VENV)/.made pyproject.toml
	@echo "Installing PyTorch and the test tools, once: this takes a minute or more."
	$(BIN)/python -m pip install $(PIP_FLAGS) --editable ".[test]"
	-$(BIN)/python -m pip download $(PIP_FLAGS) --no-deps --no-binary lmfit lmfit==1.3.4 -d $(VENV)/share
	@touch $@ $(VENV)/.demo

$(BENCH_VENV)/.ready: $(BENCH_VENV)/.made pyproject.toml benchmarks/requirements.txt
	$(BENCH_VENV)/bin/python -m pip install $(PIP_FLAGS) --editable . -r benchmarks/requirements.txt
	@touch $@

%/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "lmsolve needs Python 3.11 or newer; '$(PYTHON)' is older or missing."; \
	  echo "Name another one, for example: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "$(PYTHON) -m venv $*"
	@$(PYTHON) -m venv $* || { \
	  echo "That failed; on Debian and Ubuntu 'apt install python3-venv' helps."; exit 1; }
	@touch $@
.PRECIOUS: %/.made
