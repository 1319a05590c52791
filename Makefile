# Two commands: `make demo` and `make test`. Both make .venv first and re-use it while pyproject.toml is unchanged.
PYTHON ?= python3
WORKERS ?= 2  # processes that tests run in
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The stamp of the `docs` extra, which the site and its slow test need.
DOCS := $(VENV)/.docs

.PHONY: demo test test-slow test-all docs tpu-compiler lint clean

demo: $(STAMP)
	@$(BIN)/python -m saejax.base.assets
	@$(BIN)/saejax run --config=configs/demo.py

# The core tier compiles quickly; the slow tier compiles as users do.
test: export XLA_FLAGS := --xla_backend_optimization_level=0 $(XLA_FLAGS)
test: $(STAMP)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-slow: $(DOCS)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --slow -m slow

# The TPU compiler, which the slow tests of tests/plan/test_tpu.py need; no TPU is needed.
tpu-compiler: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[tpu-plan]'

test-all: $(DOCS)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --slow

# The documentation as a site, in site/. Pages open from disk; their search wants a server: python -m http.server -d site
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/oxlint --deny-warnings saejax/pages/site

# The stamp is written last: an interrupted installation is started again.
$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "saejax: $(PYTHON) was not found; install Python 3.11 or newer, or set PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "saejax: $(PYTHON) is $$($(PYTHON) -V 2>&1); Python 3.11 or newer is needed, set PYTHON=..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "saejax: $(PYTHON) -m venv failed; install its venv package (Debian: apt install python3-venv)" >&2; exit 2; }
	@echo "saejax: installing into $(VENV) (once, a few minutes)" >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $(STAMP)

$(DOCS): $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $(DOCS)

# Leaves runs/ and stores/ alone: they are results.
clean:
	rm -rf $(VENV) build dist site .cache *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
