# Everything a newcomer needs: `make demo`, `make test`. Both set themselves up, and are quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# written once, compiled code serves the many processes that the tests start
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test check clean
help:            ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "interp needs Python 3.11 or newer; try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@sync  # gigabytes just installed go to disk now, not while runs wait for theirs to be durable
	@touch $@

demo: $(READY)   ## a trained model traced, probed and intervened on; writes demo/index.html
	$(BIN)/interp demo --out demo

test: $(READY)   ## the whole test suite, in parallel
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(READY)  ## lint, format, types, layers, packaging
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m build --wheel --no-isolation --outdir dist . >/dev/null
	$(BIN)/python tests/check_wheel.py dist

clean:           ## forget the environment and what was made
	rm -rf $(VENV) dist demo
