# Each target sets up what it needs: only Python >= 3.11 must be there. PYTHON chooses which one.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test lint proof clean

quickstart: $(VENV)/installed
	$(BIN)/foreseen quickstart

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 -m "not slow and not proof and not gpu"

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The full matrices, by hand: everything but what needs a GPU, and more of the fuzzer.
proof: $(VENV)/installed
	FORESEEN_FUZZ=2000 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu"

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "foreseen needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	@echo "installing into $(VENV): some minutes, and several GB on Linux"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[fast,test]"
	touch $@

clean:
	rm -rf $(VENV)
