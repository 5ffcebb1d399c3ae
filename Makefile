# `make quickstart` and `make test` work on a bare clone: each prepares .venv by itself.
#   WORKDIR   where the quick start writes; an existing run is resumed
#   ARGS      further arguments, e.g. make test ARGS="tests/test_optim.py -x"
#   DATA      folder of real videos for `make faults`
# `make test` leaves out the tests marked slow, `make test-all` runs them too.
WORKDIR ?= runs/quickstart
ARGS ?=
DATA ?= $(or $(MARC_JAX_TEST_DATA),../shared/data)

VENV := .venv
, := ,
BIN := $(VENV)/bin
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))
PYTHON := $(shell for p in $(BIN)/python python3.12 python3.11 python3; do \
	"$$p" -c '$(SUPPORTED)' 2>/dev/null && command -v "$$p" && break; done)
TAG := $(shell test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; print("py%d%d" % sys.version_info[:2])')
CONSTRAINTS := requirements/constraints-$(TAG).txt
PIP := $(BIN)/python -m pip --disable-pip-version-check

# $(call install,EXTRAS,STAMP): only when setup.py or the constraints differ from what was installed.
define install
	@test -n "$(PYTHON)" || { echo "error: marc_jax needs Python 3.12 or 3.11; neither is on the PATH" >&2; exit 2; }
	@want=$$(cat setup.py $(CONSTRAINTS) | sha256sum); \
	if [ "$$(cat $(VENV)/$(2) 2>/dev/null)" != "$$want" ]; then \
		test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV) || exit 1; \
		echo "installing marc_jax[$(1)] into $(VENV), versions of $(CONSTRAINTS) ..."; \
		$(PIP) install -qq -c $(CONSTRAINTS) -e ".[$(1)]" || exit 1; \
		echo "$$want" > $(VENV)/$(2); \
	fi
endef

.PHONY: quickstart test test-all faults lint parity doctor venv clean

# On a CPU: one simulated device per core used, and a malloc that keeps its pages between steps.
quickstart: venv
	@XLA_FLAGS="$${XLA_FLAGS:---xla_force_host_platform_device_count=2}" \
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483648 MALLOC_TOP_PAD_=268435456 \
	$(BIN)/python -m marc_jax.train --config=experiments/quickstart.py --workdir=$(WORKDIR) $(ARGS)

test: venv
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(ARGS)

test-all: venv
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "slow or not slow" $(ARGS)

# What goes wrong on purpose, in full (hours: ARGS="--effort=0.1 --minutes=5" for less); `make test` runs a short form
# of each. ARGS=--write puts the table into docs/reliability.md.
faults: venv
	$(BIN)/python -m tools.faults --videos=$(DATA)/videos $(ARGS)

lint: venv
	$(BIN)/ruff check . $(ARGS)

# The tests that compare with the PyTorch reference need torch and transformers, about 1 GB more.
parity:
	$(call install,parity$(,)test,installed-parity)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(ARGS)

doctor: venv
	$(BIN)/python -m marc_jax.doctor $(ARGS)

venv:
	$(call install,test,installed)

clean:
	rm -rf $(VENV) build dist *.egg-info
