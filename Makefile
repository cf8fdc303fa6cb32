# What one does with this tree; `make` alone lists it. Needs Python 3.10 or newer and nothing else: everything is
# installed into .venv. Commands are run as modules (`python -m …`), since the scripts that pip writes
# break where the path to the folder holds a space.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
TESTS ?= tests
OUT ?= gpu.json
CLOUDS := .venv-clouds
# The lowest and the highest release of torch that tests are run with, each with the releases of others that it needs. PyPI's
# builds bring CUDA, gigabytes of it: not for CI.
FLOOR := torch==2.6.0 'numpy<2.3'
NEWEST := torch==2.14.1
# Containers often set it, and then each of the hundreds of processes that the tests start compiles the tree again.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo test clouds lint format bench gpu crash mutants docs floor newest clean

# A .venv that was moved or copied still points to the place where it was made: install again.
MOVED := $(shell [ ! -e $(VENV)/.place ] || [ "$$(cat $(VENV)/.place)" = "$$(pwd -P)" ] || rm -f $(VENV)/.ready-*)

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.ready-examples  ## train a small network on handwritten digits, on 2 CPU processes
	@"$(PY)" -m accelerate.commands.accelerate_cli launch --cpu --num_processes 2 examples/digits.py
	@echo "Next: source $(VENV)/bin/activate, then accelerate launch --cpu --num_processes 2 examples/language_model.py --epochs 1"

test: $(VENV)/.ready-test  ## run the tests (TESTS=tests/unit for a part), and say what was skipped and why
	@"$(PY)" -m pytest -rs -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

clouds: $(CLOUDS)/.ready  ## install SageMaker's SDK and an AWS to test against into .venv-clouds; `make test` finds it

lint: $(VENV)/.ready-quality  ## check style, format and types
	@"$(PY)" -m ruff check .
	@"$(PY)" -m ruff format --check .
	@"$(PY)" -m mypy
	@"$(PY)" -m pyright --pythonpath "$(PY)"

format: $(VENV)/.ready-quality  ## put imports and format in order
	@"$(PY)" -m ruff check --fix-only .
	@"$(PY)" -m ruff format .

bench: $(VENV)/.ready-test  ## measure what the wrappers cost beside raw PyTorch
	@"$(PY)" benchmarks/overhead.py

gpu: $(VENV)/.ready-test  ## check what only a GPU runs, in at most 8 minutes, and write gpu.json (OUT=FILE); small on the CPU without one
	@"$(PY)" -m tests.gpu --out "$(OUT)"

crash: $(VENV)/.ready-test  ## kill and damage checkpoints in thousands of ways and load what is left (needs strace)
	@"$(PY)" -W ignore -m tests.helpers.crash --points 208
	@"$(PY)" -W ignore -m tests.helpers.crash --points 108 --ranks 2
	@"$(PY)" -W ignore -m tests.helpers.crash --points 54 --sharded
	@"$(PY)" -W ignore -m tests.helpers.corruption

mutants: $(VENV)/.ready-clients  ## put bugs into a copy of the tree, one at a time, and see that tests fail (an hour; ONLY=ddp for some)
	@"$(PY)" tools/mutants.py $(ONLY)

docs: $(VENV)/.ready-docs  ## build the documentation into site/
	@"$(PY)" -m mkdocs build --strict --quiet
	@echo "site/index.html"

floor: .venv-floor/.ready  ## run the tests on the lowest release of torch (gigabytes to install; TESTS=tests/unit for a part)
	@.venv-floor/bin/python -m pytest -rs -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

newest: .venv-newest/.ready  ## the same on the newest release
	@.venv-newest/bin/python -m pytest -rs -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

clean:  ## remove .venv and everything that was built
	rm -rf $(VENV) $(CLOUDS) .venv-floor .venv-newest site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info

# One stamp for each extra: the second run finds it newer than what it depends on, and installs nothing.
$(VENV)/.ready-%: pyproject.toml setup.cfg constraints.txt tools/install.sh
	@sh tools/install.sh "$(PYTHON)" "$(VENV)" "$*"
	@touch "$@"

.venv-floor/.ready: pyproject.toml setup.cfg constraints.txt tools/install.sh
	@sh tools/install.sh "$(PYTHON)" .venv-floor test $(FLOOR)
	@touch "$@"

.venv-newest/.ready: pyproject.toml setup.cfg constraints.txt tools/install.sh
	@sh tools/install.sh "$(PYTHON)" .venv-newest test $(NEWEST)
	@touch "$@"

# An environment of its own: the SDK and this project want different versions of the same packages.
$(CLOUDS)/.ready: tests/clouds/requirements.txt
	@echo "making $(CLOUDS)"
	@"$(PYTHON)" -m venv --clear "$(CLOUDS)"
	@"$(CLOUDS)/bin/python" -m pip --disable-pip-version-check --no-input --quiet --quiet install --requirement "$<"
	@touch "$@"
