# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0

# Every target sets up what it needs: Python 3.11 and make are enough to start from. A stamp file per environment keeps
# the second call from installing again; a change of setup.py or setup.cfg renews it.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
VENV_OLDEST ?= .venv-oldest
# Installed first, so that no later step picks another build. On a GPU machine choose your own, as pip would take it.
TORCH ?= torch==2.13.0
# Two processes with one thread each do as much as two threads in one, and also share out Python's own work; more threads
# than cores slow torch down several-fold. Every further worker pays its own import of torch and transformers.
WORKERS ?= 2
# Handed on as they are: make test ARGS="-m slow -k wanda", make demo ARGS=--help.
ARGS ?=

SOURCES := optimum_ssm tests examples docs setup.py
BASE := $(VENV)/.stamp-base
DEV := $(VENV)/.stamp-dev
OLDEST := $(VENV_OLDEST)/.stamp
PYTEST := -m pytest -n $(WORKERS) --dist worksteal

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Spinning OpenMP threads make small tensor operations ten times slower where other work shares the cores.
export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-oldest quality style docs clean

help:  ## this list
	@echo "optimum_ssm: make TARGET"
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/  \1@\2/p' $(firstword $(MAKEFILE_LIST)) | tr '@' '\t' | expand -t 16

demo: $(BASE)  ## prune the embedded example model on the CPU
	$(VENV)/bin/python examples/quickstart.py $(ARGS)

# Offline, because no test may depend on the Hub: one that does fails at once, on every machine.
test test-slow test-oldest: export OMP_NUM_THREADS := 1
test test-slow test-oldest: export HF_HUB_OFFLINE := 1

test: $(DEV)  ## the tests, without the slow ones
	$(VENV)/bin/python $(PYTEST) $(ARGS)

test-slow: $(DEV)  ## the slow tests alone
	$(VENV)/bin/python $(PYTEST) -m slow $(ARGS)

test-oldest: $(OLDEST)  ## the tests on the oldest supported libraries
	$(VENV_OLDEST)/bin/python $(PYTEST) $(ARGS)

quality: $(DEV)  ## check style, formatting and generated pages, change nothing
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/ruff format --check $(SOURCES)
	$(VENV)/bin/python docs/generate.py --check

style: $(DEV)  ## fix style and formatting in place
	$(VENV)/bin/ruff check --fix $(SOURCES)
	$(VENV)/bin/ruff format $(SOURCES)

# MDX with every [[autodoc]] resolved and the table of contents checked. HTML needs node and doc-builder's site template,
# which is not in its package but fetched from its repository: make docs ARGS=--html does that where the network allows.
docs: $(DEV)  ## build the documentation into docs/build
	$(VENV)/bin/python docs/generate.py
	$(VENV)/bin/python docs/build.py build optimum_ssm docs/source --build_dir docs/build --clean \
		--version_tag_suffix "" --repo_name optimum-ssm $(ARGS)

clean:  ## remove what was built, cached or written by the examples; the environments stay
	rm -rf build dist *.egg-info docs/build examples/output .pytest_cache .ruff_cache .hypothesis
	find optimum_ssm tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.stamp-torch $(VENV_OLDEST)/.stamp-torch: %/.stamp-torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=…")'
	@echo "Setting up $*: some minutes, once"
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet "$(TORCH)"
	@touch $@

# --use-pep517: with a legacy editable install optimum-cli would not find the command.
$(BASE): $(VENV)/.stamp-torch setup.py setup.cfg
	$(VENV)/bin/python -m pip install --quiet --use-pep517 -e .
	@touch $@

$(DEV): $(BASE)
	$(VENV)/bin/python -m pip install --quiet --use-pep517 -e ".[dev,eval]"
	@touch $@

# The lower bounds of setup.cfg, taken at their word. Torch is the exception: its old CPU builds are not everywhere.
$(OLDEST): $(VENV_OLDEST)/.stamp-torch setup.py setup.cfg
	sed -n '/^install_requires/,/^$$/s/^ *\([a-z0-9-]*\)>=\([0-9.]*\)$$/\1==\2/p' setup.cfg | grep -v '^torch=' \
		> $(VENV_OLDEST)/constraints.txt
	$(VENV_OLDEST)/bin/python -m pip install --quiet --use-pep517 -c $(VENV_OLDEST)/constraints.txt -e ".[tests,eval]"
	@touch $@
