# Two commands: `make demo` does the main job on real input, `make test` tests it.
# Both set up .venv by themselves; all they need is Python 3.11 or newer with venv.

PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
PY := .venv/bin/python
# Tests run on the CPU and fetch nothing. Python keeps the byte code of the package and of the tests, also where the
# environment says otherwise: every test process and every command that a test starts would compile them again.
TEST_ENV := JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=
# A process for each of at most four cores; the tests of a file stay together, and tests/conftest.py orders the files.
PARALLEL := -n auto --maxprocesses=4 --dist loadfile --no-loadscope-reorder
# The modules with tests that compile nothing: pytest imports these alone, which takes most of its time otherwise.
SMOKE = $(shell grep -lE 'pytest\.mark\.smoke' tests/test_*.py)
# The modules with slow tests and those with aot ones, for the same reason.
SLOW = $(shell grep -lE 'pytest\.mark\.slow' tests/test_*.py)
AOT = $(shell grep -lE 'pytest\.mark\.aot' tests/test_*.py)

.PHONY: help install demo smoke test test-slow test-aot lint docs docker format clean

help:
	@echo 'make demo       train, evaluate, export and ask a small model (demo/run, demo/hf)'
	@echo 'make install    .venv with the package and its commands'
	@echo 'make smoke      a first check, under a minute'
	@echo 'make test       the test suite on CPU'
	@echo 'make test-slow  the tests marked slow'
	@echo 'make test-aot   compiles the 3B to 7B models for the TPUs that their configs name'
	@echo 'make lint       style, types and layers;  make format fixes what it can'
	@echo 'make docs       the documentation as a site: open site/index.html'
	@echo 'make docker     an image for CPUs; EXTRAS=cuda,hf,lab makes one for GPUs'
	@echo 'make clean      removes .venv and what the demo left'

demo: .venv/.lab
	$(PY) demo/demo.py

install: .venv/.base
	@echo 'installed in .venv; now: source .venv/bin/activate'

smoke: .venv/.test
	$(TEST_ENV) $(PY) -m pytest -q $(PARALLEL) -m 'smoke and not slow' $(ARGS) $(SMOKE)

test: .venv/.test
	$(TEST_ENV) $(PY) -m pytest -q $(PARALLEL) -m 'not slow and not gpu and not aot' $(ARGS)

test-slow: .venv/.test
	$(TEST_ENV) $(PY) -m pytest -q $(PARALLEL) -m 'slow and not gpu and not aot' $(ARGS) $(SLOW)

test-aot: .venv/.test
	$(TEST_ENV) $(PY) -m pytest -q -m aot -rP $(ARGS) $(AOT)

lint: .venv/.test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright
	.venv/bin/lint-imports

# The site fetches nothing, neither when it is built nor when it is read. A broken link is an error.
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

docker:
	docker build --tag mice_jax $(if $(EXTRAS),--build-arg EXTRAS=$(EXTRAS)) .

format: .venv/.test
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:
	rm -rf .venv build site *.egg-info demo/run demo/hf demo/data demo/result.json studies/recall/runs .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# --- set-up -------------------------------------------------------------------------------------
# .base, .lab, .test and .docs say which packages .venv holds; new pins or dependencies install again.
PINS := pyproject.toml $(wildcard constraints/*.txt)
# The pins of the .venv's own Python: newer ones than 3.12 take those of 3.12.
INSTALL = $(PY) -m pip install --disable-pip-version-check \
  -c constraints/$$($(PY) -c 'import sys; print("py311" if sys.version_info < (3, 12) else "py312")').txt

.venv/.base: $(PINS) | .venv/bin/python
	@$(call need_python,$(PY),make clean; then the same with PYTHON=/path/to/python3.11)
	$(INSTALL) -e .
	@touch $@

# The demo ends with a report.
.venv/.lab: .venv/.base
	$(INSTALL) -e '.[lab]'
	@touch $@

.venv/.test: .venv/.base
	$(INSTALL) -e '.[test]'
	@touch $@

.venv/.docs: .venv/.base
	$(INSTALL) -e '.[docs]'
	@touch $@

.venv/bin/python:
	@$(call need_python,$(PYTHON),the same with PYTHON=/path/to/python3.11)
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

# $(call need_python,interpreter,fix): stop with a clear message unless it is Python 3.11 or newer.
define need_python
$(1) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
  echo "error: mice_jax needs Python 3.11 or newer; '$(1) --version' says:" \
  "$$($(1) --version 2>&1). Try: $(2)" >&2; exit 2; }
endef
