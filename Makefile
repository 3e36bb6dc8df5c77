# Thin targets; the work is in scripts/. Everything lives in .venv, nothing outside this directory is changed
# but RBEE_HOME (by default your user data directory).
PYTHON ?= python3
PROMPT ?= Why is the sky blue? Answer in one sentence.
export PYTHON PROMPT

.PHONY: setup setup-dev infer up down test check chaos bench bench-peers clean

setup:
	@scripts/setup

setup-dev:
	@scripts/setup dev

infer: setup
	@.venv/bin/rbee infer -- "$$PROMPT"

up: setup
	@.venv/bin/rbee up

down: setup
	@.venv/bin/rbee down

test: setup-dev
	@scripts/test

check: setup-dev
	@scripts/check

chaos: setup-dev
	@scripts/chaos

bench: setup-dev
	@scripts/bench

bench-peers: setup-dev
	@scripts/bench narrate jobs_peers serving_peers

clean:
	@rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
