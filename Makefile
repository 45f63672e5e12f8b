# Every target sets up what it needs: on a fresh machine `make demo` and `make test` are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEER := build/peer
SOURCES := pipeline train embed ingest cluster tests benchmarks

.PHONY: setup demo check format test test-fast kills bench clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v < (3, 13) or sys.exit("unclip needs Python 3.11 or 3.12; $(PYTHON) is %d.%d. Name another: make PYTHON=python3.11 …" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[cpu,dev]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/unclip run demo --out runs/demo

check: $(READY)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

test: $(READY)
	$(BIN)/python -m pytest

test-fast: $(READY)
	$(BIN)/python -m pytest -m "not slow"

# Hours or quiet machines, not CI: each writes a dated page.
kills: $(READY)
	$(BIN)/python -m tests.pipeline.kills --page docs/kills.md

bench: $(READY) $(PEER)/bin/img2dataset
	$(BIN)/python -m benchmarks.stages
	$(BIN)/python -m benchmarks.pairs --page docs/benchmarks/pairs.md
	$(BIN)/python -m benchmarks.ingest --peer-python $(PEER)/bin/python --page docs/benchmarks/ingest.md

$(PEER)/bin/img2dataset:
	$(PYTHON) -m venv $(PEER)
	$(PEER)/bin/python -m pip install --quiet img2dataset==1.47.0

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
