# Two commands: `make demo` sets up and runs the main job, `make test` sets up and runs the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch comes first and pinned: the CPU build is enough, and an open range may pull gigabytes of CUDA.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: setup demo test check clean

setup: $(VENV)/.stamp

$(VENV)/.stamp: pyproject.toml constraints.txt CMakeLists.txt $(wildcard quant/CMakeLists.txt quant/src/* kernels/CMakeLists.txt kernels/src/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e '.[oracle,dev]'
	touch $@

demo: setup
	$(BIN)/zaya-convert quantize --bits 4 -o out/zaya1-tiny-int4 --overwrite
	$(BIN)/zaya-convert validate out/zaya1-tiny-int4 --max-kl 0.001 --min-top1 0.99 --rsa

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Triton has wheels for Linux on x86-64 alone. Without a GPU its kernels run in its interpreter, and are
# compiled for four targets within their budget.
test: check
	$(BIN)/pytest
	-$(INSTALL) triton
	if $(BIN)/python -c 'import triton' 2>/dev/null; then \
		TRITON_INTERPRET=1 $(BIN)/pytest tests/gpu && $(BIN)/python tools/compile_kernels.py; fi

clean:
	rm -rf $(VENV) build out
