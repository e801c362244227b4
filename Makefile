# Every target sets up .venv by itself when it is missing or out of date. Needed: Python >= 3.11 and a C++ compiler.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Tests run in two processes of one thread each; tests/conftest.py sets the threads.
WORKERS ?= 2

.PHONY: setup demo test test-slow lint bench families clean

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "accelc needs Python >= 3.11: make PYTHON=python3.11 ...")'
	@command -v "$${CXX:-g++}" >/dev/null || command -v clang++ >/dev/null || { echo "accelc needs a C++ compiler: install g++ or clang++" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[transformers,train,plot,dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/accelc demo

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not gpu" --durations=15

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "slow and not gpu" --durations=15

# mypy does not follow the package-dir mapping, so it runs on an installed copy; build/ goes first because setuptools reuses stale files in it.
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/types .
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml accelc

bench: $(STAMP)
	$(BIN)/python benchmarks/decode.py

families: $(STAMP)
	$(BIN)/python benchmarks/families.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find accelc passes codegen runtime tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
