# memlens: `make help` lists the targets. Needed: python3 (3.11 or newer), make and a package index.
# `TL=4` runs any target in a second environment, on TransformerLens 4.x.

TL ?= 3
PYTHON3 ?= python3
WORKERS ?= 2

ifeq ($(TL),3)
VENV := .venv
CONSTRAINTS := constraints.txt
else ifeq ($(TL),4)
VENV := .venv-tl4
CONSTRAINTS := constraints-tl4.txt
else
$(error TL=$(TL) is not known: give TL=3 (TransformerLens 3.9, the default) or TL=4)
endif

BIN := $(VENV)/bin
READY := $(VENV)/.installed
DEV_READY := $(VENV)/.installed-dev
# More threads than free cores make small models many times slower.
RUN := OMP_NUM_THREADS=1 $(BIN)/python -m

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo install test lowest wheel gpu notebooks lint format types contract docs clean

help: ## List the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /: /' | awk -F': ' '{printf "make %-10s %s\n", $$1, $$2}'

demo: $(READY) ## Find where the bundled model recalls what was planted in it; write a report
	$(BIN)/memlens demo

install: $(DEV_READY) ## Make the environment with everything for development

test: $(DEV_READY) ## Run the whole test suite, the slow tests and the docstrings' examples included
	$(RUN) pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

LOWEST := .venv-lowest
# Chosen among the tests that are quick and touch every dependency.
LOWEST_TESTS := tests/test_package.py tests/test_files.py tests/test_options.py tests/results tests/sequences \
	tests/forward/test_metrics.py tests/report/test_run_directory.py

lowest: $(LOWEST)/.installed ## Run a quick part of the tests with the lowest versions that pyproject.toml allows
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -q -m "not slow" -p no:cacheprovider $(LOWEST_TESTS)

# torch has the version of constraints.txt: another one is gigabytes, and its floor is not tested. uv does not read pip's
# settings, so it is told which indices, files and certificates pip uses here.
$(LOWEST)/.installed: pyproject.toml memlens-zoo/pyproject.toml constraints.txt
	$(PYTHON3) -m venv $(LOWEST)
	@$(LOWEST)/bin/python -m pip install -qq --disable-pip-version-check uv
	@$(LOWEST)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt torch
	@grep '^torch==' constraints.txt >$(LOWEST)/torch.txt
	@setting() { $(LOWEST)/bin/python -m pip config get "$$1" 2>/dev/null || true; }; \
	index="$$(setting global.index-url)"; more="$$(setting global.extra-index-url)"; \
	files="$${PIP_FIND_LINKS:-$$(setting global.find-links)}"; cert="$${PIP_CERT:-$$(setting global.cert)}"; \
	[ -z "$$index" ] || export UV_DEFAULT_INDEX="$$index"; \
	[ -z "$$more" ] || export UV_INDEX="$$more"; \
	[ -z "$$files" ] || export UV_FIND_LINKS="$$files"; \
	[ -z "$$cert" ] || export SSL_CERT_FILE="$$cert"; \
	UV_INDEX_STRATEGY=unsafe-best-match $(LOWEST)/bin/uv pip compile -q --resolution lowest-direct \
		--extra dev --constraint $(LOWEST)/torch.txt -o $(LOWEST)/all.txt pyproject.toml
	@grep -vE '^(torch|triton|nvidia|cuda)[-a-z0-9]*==|^ *#' $(LOWEST)/all.txt >$(LOWEST)/requirements.txt
	$(LOWEST)/bin/python -m pip install -qq --disable-pip-version-check --no-deps -r $(LOWEST)/requirements.txt
	$(LOWEST)/bin/python -m pip install -qq --disable-pip-version-check --no-deps -e . -e ./memlens-zoo
	@touch $@

wheel: $(DEV_READY) ## Build the wheel, install it in an environment of its own, and run the demo there
	rm -rf dist .venv-wheel
	@$(BIN)/python -m pip wheel -q --disable-pip-version-check --no-deps --wheel-dir dist . ./memlens-zoo
	@$(PYTHON3) -c 'import glob, os; (f,) = glob.glob("dist/memlens-[0-9]*.whl"); n = os.path.getsize(f) / 1e6; print(f"{f}: {n:.1f} MB"); assert n < 8'
	$(PYTHON3) -m venv .venv-wheel
	@.venv-wheel/bin/python -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS) dist/memlens-[0-9]*.whl
	cd dist && OMP_NUM_THREADS=1 ../.venv-wheel/bin/memlens demo --out demo
	! .venv-wheel/bin/memlens check zoo/olmo2-s 2>/dev/null
	@.venv-wheel/bin/python -m pip install -qq --disable-pip-version-check --no-deps dist/memlens_zoo-*.whl
	cd dist && ../.venv-wheel/bin/memlens check zoo/olmo2-s

# Without an index: in whatever environment has the packages, such as GPU_PYTHON=python3.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON3))
DEVICE ?= cuda

gpu: ## On a machine with a GPU: the tests on it, then the benchmark table in float32 and bfloat16, as JSON in gpu/
	$(GPU_PYTHON) -m benchmarks.on_device --device $(DEVICE) --workers $(WORKERS) --out gpu $(GPU_ARGS)

notebooks: $(DEV_READY) ## Run the tutorials
	$(RUN) pytest --nbmake --nbmake-timeout=900 tutorials

lint: $(DEV_READY) ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEV_READY) ## Mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(DEV_READY) ## Check the types, and that the public names have them in full
	$(BIN)/pyright --pythonpath $(BIN)/python
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pyright --verifytypes memlens --ignoreexternal >$(VENV)/types.txt || \
		{ grep -B1 ' error:' $(VENV)/types.txt; exit 1; }
	@grep 'completeness' $(VENV)/types.txt

contract: $(DEV_READY) ## Check that folders import only from folders to their left
	$(BIN)/lint-imports

docs: $(DEV_READY) ## Build the documentation into docs/_build/html
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

clean: ## Remove environments, caches and everything built
	rm -rf .venv .venv-tl4 .venv-lowest .venv-wheel build dist docs/_build docs/reference docs/tutorials docs/_static/plotly.min.js
	rm -rf .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find memlens memlens-zoo tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/pyvenv.cfg:
	@$(PYTHON3) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "memlens needs Python 3.11 or newer and $(PYTHON3) is %d.%d: name another one, as in make demo PYTHON3=python3.12" % sys.version_info[:2])'
	$(PYTHON3) -m venv $(VENV)

$(READY): pyproject.toml memlens-zoo/pyproject.toml $(CONSTRAINTS) | $(VENV)/pyvenv.cfg
	@echo "installing into $(VENV); this takes some minutes"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS) -e . -e ./memlens-zoo
	@touch $@

$(DEV_READY): pyproject.toml memlens-zoo/pyproject.toml $(CONSTRAINTS) | $(VENV)/pyvenv.cfg
	@echo "installing into $(VENV); this takes some minutes"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev,docs,export]' -e ./memlens-zoo
	@touch $(READY) $@
