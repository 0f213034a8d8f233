# Two commands: `make demo` and `make test`. Both create .venv on the first run and start at once on the next.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml

.PHONY: demo test bench sanitize cuda-all abi-matrix clean

demo: .venv/built
	$(BIN)/calora demo

test: .venv/built
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

bench: .venv/built
	$(BIN)/python -m pytest benchmarks

# Every CPU kernel on exactly sized buffers under AddressSanitizer and UndefinedBehaviorSanitizer. No torch in it; some minutes.
sanitize: .venv/installed
	$(BIN)/cmake -GNinja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -S csrc/tests -B build/sanitize
	$(BIN)/cmake --build build/sanitize
	build/sanitize/sanitize

# Every architecture, one by one: time, size, spills. Needs nvcc, no GPU.
cuda-all: .venv/built
	$(BIN)/python benchmarks/cuda_all.py --out benchmarks/results/cuda-all.json

# The one library on every torch it promises to load in. Downloads several GB into build/abi.
abi-matrix: .venv/built
	$(BIN)/python benchmarks/abi_matrix.py --out benchmarks/results/abi-matrix.json

# torch first and alone: asked for together with the rest, pip may take another build of it.
.venv/installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/built: .venv/installed $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf .venv build dist *.egg-info calora_ext/lib calora_ext/_native*.so
