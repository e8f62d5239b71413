# Starling: `make` lists the targets. Nothing here needs the network except pip.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL = PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/pip install \
	--disable-pip-version-check --quiet --constraint constraints.txt --editable
# What the packages' docstrings show is run as well.
TESTED := tests src/starling
PYTEST = $(BIN)/pytest --doctest-modules $(TESTED)
# Two halves, each collected once: tests/cluster needs Ray, nothing else does. The workers of the first share the cores:
# with several threads each they would wait for one another.
QUICK = OMP_NUM_THREADS=1 $(PYTEST) --ignore=tests/cluster -n auto -m "not slow"
CLUSTER = $(BIN)/pytest tests/cluster $(TWO_RAYS) -m "not slow"
# A deprecation that an old dependency finds in a newer one is not ours. What has few dependencies is not tried.
OLDEST := -W default -m "not slow" tests/conformance tests/config/test_config.py tests/cli/test_cli.py tests/tracking \
	tests/checkpoints/test_store.py tests/data/test_files.py tests/runtimes/test_ray_internals.py tests/cluster/test_runtime.py
# Each of two workers has a Ray of its own: tests on Ray wait much for processes that begin, and for losses to be noticed.
TWO_RAYS := -n 2 --dist loadgroup

# Ray and MLflow report their use to their makers unless told not to.
export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true
# Tests start hundreds of processes. Without bytecode on disk each compiles our sources again, and each worker of pytest
# rewrites the assertions of 220 files: some 20 of its first 40 seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.* ## \(.*\)$$/\1\t\2/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r name text; do \
		printf '  make %-11s %s\n' "$$name" "$$text"; \
	done

.PHONY: install
install: .venv/.installed ## set up .venv (PYTHON=python3.12 picks the interpreter)

# A virtual environment that was interrupted half-way has no pip and is made again.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Starling needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1 || true): make install PYTHON=python3.11"; \
		exit 2; \
	}
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "installing into .venv: torch, Ray and MLflow are large, this takes minutes"
	@$(PIP_INSTALL) '.[dev]'
	@touch $@

.PHONY: demo
demo: install ## train a small model on 4 Ray nodes, tracked in MLflow
	$(BIN)/starling run examples/streaming_diloco.yaml

.PHONY: style
style: install ## ruff, formatting and import rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-cache

.PHONY: lint
lint: style ## style, and types
	$(BIN)/basedpyright

.PHONY: format
format: install ## let ruff repair what it can
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format

.PHONY: test
test: style ## lint and all tests but the slow ones: quick ones first, then those on a Ray cluster, and types meanwhile
	$(QUICK)
	@# Tests on Ray mostly wait, and types need a core for a minute. Both are seen to their end.
	status=0; $(BIN)/basedpyright & $(CLUSTER) || status=$$?; wait $$! || status=$$?; exit $$status

.PHONY: coverage
coverage: install ## the tests of make test, and which lines and branches they leave out (takes twice as long)
	$(QUICK) --cov --cov-report=
	$(CLUSTER) --cov --cov-append --cov-report=
	@$(BIN)/coverage report

.PHONY: test-ci
test-ci: test ## what .ci/run runs: make test, the slow tests but the long ones, and of those on Ray the marked ones (smoke)
	OMP_NUM_THREADS=1 $(PYTEST) --ignore=tests/cluster -n auto -m "slow and not long and not soak"
	$(BIN)/pytest tests/cluster $(TWO_RAYS) -m smoke

.PHONY: test-slow
test-slow: install ## all slow tests, but those of make soak
	$(PYTEST) $(TWO_RAYS) -m "slow and not soak"

.PHONY: test-oldest
test-oldest: ## a smoke run with the oldest dependencies that pyproject.toml allows, in .venv-oldest
	@test -x .venv-oldest/bin/pip || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --disable-pip-version-check --quiet --constraint constraints-oldest.txt --editable . \
		pytest pytest-timeout hypothesis
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest $(OLDEST)

.PHONY: soak
soak: install ## much at random: fault histories (N=1000 SEED=7 PROCESSES=2), damage, configurations, resume at each commit
	$(BIN)/python -m tests.soak $(or $(N),1000) $(or $(SEED),0) $(or $(PROCESSES),1)
	$(PYTEST) -n auto -m soak

.PHONY: mutants
mutants: install ## which plausible mistakes do the tests notice? (ONLY="outer closing": some); not part of CI
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants.run --survivors mutants.txt $(if $(ONLY),--only $(ONLY))

.PHONY: bench
bench: install ## measure, and compare with what we promise (ONLY="zeroth_order codecs": some, and keep the other rows)
	$(BIN)/python benchmarks/run.py $(ONLY)

.venv/.installed-docs: .venv/.installed
	$(PIP_INSTALL) '.[dev,docs]'
	@touch $@

.PHONY: docs
docs: .venv/.installed-docs ## build the documentation into site/
	$(BIN)/mkdocs build --strict --quiet

.PHONY: docs-tables
docs-tables: install ## write the tables of algorithms and parts in README.md and docs/ from the code
	$(BIN)/python -m tests.tables

.PHONY: clean
clean: ## remove caches and build outputs; keeps .venv, runs and mlflow.db
	rm -rf build dist site htmlcov .coverage .coverage.* .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
