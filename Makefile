# Each target prepares .venv by itself: `make quickstart` and `make test` work on a bare clone.
WORKDIR ?= runs/quickstart
ARGS ?=

PYTHON := $(shell command -v python3.12 || command -v python3.11)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINTS := requirements/constraints-$(if $(findstring 3.12,$(PYTHON)),py312,py311).txt

.PHONY: quickstart test lint parity doctor clean

quickstart: $(VENV)/installed
	$(BIN)/python -m marc_jax.train --config=experiments/quickstart.py --workdir=$(WORKDIR) $(ARGS)

test: $(VENV)/installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check . $(ARGS)

# PyTorch and transformers (about 1 GB), for the tests that compare with the reference implementations.
parity: $(VENV)/installed-parity
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(ARGS)

doctor: $(VENV)/installed
	$(BIN)/python -m marc_jax.doctor $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info

# The stamp is newer than what it was made from, or the environment is brought up to date.
$(VENV)/installed: setup.py $(CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "error: marc_jax needs python3.12 or python3.11 on the PATH; neither was found" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing marc_jax into $(VENV) ($(CONSTRAINTS)) ..."
	@$(PIP) install --quiet -c $(CONSTRAINTS) -e ".[test]"
	@touch $@

$(VENV)/installed-parity: $(VENV)/installed
	@echo "installing PyTorch and transformers into $(VENV) ..."
	@$(PIP) install --quiet -c $(CONSTRAINTS) -e ".[parity,test]"
	@touch $@
