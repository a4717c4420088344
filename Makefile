# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

# One thread for each process of the test suite: processes of two threads on two cores wait for each other.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-all test-contrib lint docs clean

help:
	@echo "make quickstart   install into .venv, pull a small model, distil it on this CPU (about 15 minutes)"
	@echo "make test         install into .venv and run the test suite"
	@echo "make test-all     everything, with real models (an hour)"
	@echo "make test-contrib every package of plugins-contrib, from wheels in an environment of its own"
	@echo "make lint         ruff, mypy --strict, import-linter"
	@echo "make docs         regenerate docs/recipe.schema.json and docs/reference, build the site into site/"

# torch comes first and from the constraints: whatever else asks for it is then satisfied.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt torch
	$(PIP) install --quiet -c constraints.txt -e ".[test,lint,docs]"
	@touch $@

install: $(VENV)/.installed

quickstart: install
	$(BIN)/kdkit models pull smollm2-135m-instruct
	$(BIN)/kdkit run recipes/quickstart.yaml
	@echo
	@echo "Run it again: everything is cached. Then try the teacher's distributions alone:"
	@echo "  $(BIN)/kdkit run recipes/quickstart.yaml --set stages.kd.losses='[{use: forward-kl}]'"

test: install
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -q $(PARALLEL)

test-all: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q

test-contrib:
	PYTHON=$(PYTHON) .ci/contrib

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Not --quiet: mkdocs then counts no warnings, and --strict lets all of them pass.
docs: install
	KDKIT_DISABLE_PLUGINS='*' $(BIN)/kdkit schema --out docs/recipe.schema.json
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) .kdkit runs site
