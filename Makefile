# `make demo` and `make test` need Python 3.11 and pip, nothing else; `make help` lists the rest.
PYTHON ?= $(or $(shell command -v python3.11),python3)
DEVICE ?= auto
JOBS ?= 2
BIN := .venv/bin
PINS := pyproject.toml --all-extras --universal --python-version 3.11 --no-annotate \
	--overrides requirements/overrides.txt --excludes requirements/excludes.txt
# Where this is set (many containers do), every process compiles torch and transformers anew: 6 s a start.
unexport PYTHONDONTWRITEBYTECODE
.DEFAULT_GOAL := help
.PHONY: setup setup-dev demo test lint type bench study docs check pins clean help

setup: ## install what `zscore` needs into .venv
	@$(PYTHON) scripts/install.py base --device $(DEVICE)

setup-dev: ## install vLLM and everything that the tests need too
	@$(PYTHON) scripts/install.py dev --device $(DEVICE)

demo: setup ## draw shards, score them, compare with the truth
	@$(BIN)/zscore demo demo-out

test: setup-dev ## run all the tests (ARGS="-k tar" for some)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

lint: setup-dev ## ruff, its formatter, import directions
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

type: setup-dev ## mypy, strict
	$(BIN)/mypy

bench: setup-dev ## every benchmark but the studies: a table each, JSON under benchmarks/results
	@set -e; for bench in $(filter-out benchmarks/world_%,$(wildcard benchmarks/[!_]*.py)); do \
		echo "== $$bench"; $(BIN)/python $$bench; done

study: setup-dev ## the trainers' studies in the rubric world, hours: base, learning rates, comparison
	@set -e; for study in base rates study; do $(BIN)/python benchmarks/world_$$study.py; done

docs: setup-dev ## write docs/cli.md from the commands' own help
	$(BIN)/python scripts/cli_reference.py

check: lint type test ## what a change must pass

pins: setup-dev ## resolve requirements/constraints.txt anew (UPGRADE=--upgrade takes newer versions)
	$(BIN)/uv pip compile --quiet $(PINS) $(UPGRADE) --custom-compile-command "make pins" \
		--output-file requirements/constraints.txt

clean: ## remove everything that git ignores, .venv too
	git clean -fdX

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile
