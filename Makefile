# One word each; `make help` lists them. All of them set up what they need first.
.DEFAULT_GOAL := help
.PHONY: help setup demo test long lint format bench docs protos lock gpu-bundle clean

BIN := .venv/bin

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

setup: ## build .venv from the lock and make the small model (once; then a second)
	@scripts/setup.sh

demo: setup ## the same agents on vLLM, stock LMCache and kvtier, side by side
	$(BIN)/kvtier demo

# Two at a time, file by file: those with engines wait much. They come first, as they take longest.
test: setup ## the tests that this machine can run, but for the long ones
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

long: setup ## the tests that take minutes: engines of several ranks, LoRA, drafts, grammars
	TEST_LONG=1 $(BIN)/python -m pytest -m long

lint: setup ## ruff, mypy --strict and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## what a decision costs the scheduler
	$(BIN)/python bench/decision_cost.py

docs: setup ## renew the reference pages and build the documentation into site/
	$(BIN)/python scripts/reference_pages.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

protos: setup ## check proto/ and generate kvtier/v1 from it
	scripts/protos.sh

lock: setup ## resolve the environment anew (requirements/cpu.txt)
	scripts/lock.sh

gpu-bundle: setup ## one directory to copy to a GPU host without network: tests, benchmark, wheels
	scripts/gpu_bundle.sh

clean: ## remove .venv and caches of the tree; the model stays in the user's cache
	rm -rf .venv site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist
