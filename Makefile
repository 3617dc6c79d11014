# make demo   train a small hybrid on this machine, generate from it (about two minutes on two cores)
# make test   the whole CPU test suite
# make lint   ruff, and the rules for the files that travel with a checkpoint
#
# Everything lives in .venv. The stamp files in it make a second call start at once; changing setup.cfg or
# constraints.txt installs again. To use another interpreter: make demo PYTHON=/path/to/python3.11

PYTHON ?= $(firstword $(shell command -v python3.11 || command -v python3 || command -v python))
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
# The constraints pin torch and everything else to the versions that CI ran.
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-input -c constraints.txt

.PHONY: demo test lint clean

# Threads that sleep while they wait: on a machine that does something else as well, spinning ones cost several times the
# work itself.
demo: $(VENV)/.train
	OMP_WAIT_POLICY=passive $(BIN)/python -m training.demo

# One thread per test process: two that compete for the same cores are slower than one.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
	    $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m "not gpu" tests

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tests.check_shipped_files

$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "Python 3.11 or newer is needed; PYTHON=$(PYTHON) is older or missing."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.%: $(VENV)/.venv setup.cfg pyproject.toml constraints.txt
	@echo "Installing into $(VENV); the first time this takes a minute or more."
	$(INSTALL) -e ".[$*]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info runs
