# Everything from nothing: a virtual environment of its own, pinned dependencies, no GPU, no account.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# Unset CPU threads make every worker take every core (measured: four times slower under contention).
export OMP_NUM_THREADS ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup demo serve test test-full chaos autoscale check bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       embed a real knowledge base, ask, change it, serve it, ask again"
	@echo "make serve      leave the server running, with a page at its address"
	@echo "make test       the tests (minutes)        make test-full  all of them"
	@echo "make chaos      processes killed at random moments, SEEDS=50 runs: nothing acknowledged may be lost"
	@echo "make autoscale  a backlog of FACTS=200000 on Ray's autoscaler: nodes come, work and go"
	@echo "make check      formatter, linter, types and tests: what CI runs"
	@echo "make bench      ours against the alternative, in one run"

setup: $(READY)

# torch first: it decides between a CPU and a CUDA build, and everything else accepts what is there.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/python -m kblam_ray.demo

# PORT=8080 make serve: another port than 8000.
serve: $(READY)
	$(BIN)/python -m kblam_ray.demo.server

test: $(READY)
	$(BIN)/python -m pytest -m "not slow"

test-full: $(READY)
	$(BIN)/python -m pytest

# FIRST=50 make chaos: other seeds. What is hit and what came of it is in chaos-verdicts.jsonl.
SEEDS ?= 50
FIRST ?= 0
chaos: $(READY)
	$(BIN)/python -m tests.chaos.run --seeds $(SEEDS) --first $(FIRST) --output chaos-verdicts.jsonl --keep chaos-failures

# FACTS=20000 make autoscale: a smaller backlog.
FACTS ?= 200000
autoscale: $(READY)
	$(BIN)/python -m tests.chaos.autoscale --facts $(FACTS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow"

bench: $(READY)
	$(BIN)/python jobs/benchmark.py encode
	$(BIN)/python jobs/benchmark.py load
	$(BIN)/python jobs/benchmark.py embed --num-facts 100000 --workers 1 --workers 2
	$(BIN)/python jobs/benchmark.py attention --num-facts 1000 --num-facts 10000 --rounds 3

clean:
	rm -rf $(VENV) demo-kb build *.egg-info chaos-failures chaos-verdicts.jsonl
