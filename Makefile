# One word each; `make help` lists them. All of them set up what they need first.
.DEFAULT_GOAL := help
.PHONY: help setup demo test long fuzz soak load lint format audit sbom dist bench docs protos lock gpu-bundle clean

BIN := .venv/bin

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

setup: ## build .venv from the lock and make the small model (once; then a second)
	@scripts/setup.sh

demo: setup ## the same agents on vLLM, stock LMCache and kvtier, side by side
	$(BIN)/kvtier demo

# Two at a time, file by file: those with engines wait much. They come first, as they take longest.
test: setup ## the tests that this machine can run, but for the long ones
	$(BIN)/python -m pytest --durations=15 --durations-min=5 -n 2 --dist loadfile --no-loadscope-reorder

long: setup ## the tests that take minutes: engines of several ranks, LoRA, drafts, grammars
	TEST_LONG=1 $(BIN)/python -m pytest -m long

# FUZZ_EXAMPLES: of each fuzzer; without it as many as `make test` tries.
fuzz: setup ## damaged and hostile input for what reads traces, settings and messages
	$(BIN)/python -m pytest tests/fuzz -p no:xdist --timeout 0

soak: setup ## eight hours of virtual time at saturating load, with faults (minutes)
	$(BIN)/python bench/soak.py

load: setup ## kvtier's cost as the programs held grow from 10 to 10,000 (minutes)
	$(BIN)/python bench/load.py

lint: setup ## ruff, mypy --strict, the import contracts and bandit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/bandit --quiet --recursive --configfile pyproject.toml kvtier bench scripts

format: setup ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Asks an advisory service on the internet. `.ci/run` shows what it says and goes on.
audit: setup ## known vulnerabilities of what the lock names
	scripts/audit.sh

sbom: setup ## a bill of materials of the lock, as CycloneDX (dist/)
	scripts/sbom.sh

dist: setup ## the files of a release, with their digests (dist/)
	scripts/dist.sh

bench: setup ## what a decision costs the scheduler
	$(BIN)/python bench/decision_cost.py

docs: setup ## renew the reference pages and build the documentation into site/
	$(BIN)/python scripts/reference_pages.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

protos: setup ## check proto/ and generate kvtier/v1 from it; with RENEW=1 it is what clients rely on
	scripts/protos.sh $(if $(RENEW),--renew)

lock: setup ## resolve the environment anew (requirements/cpu.txt)
	scripts/lock.sh

gpu-bundle: setup ## one directory to copy to a GPU host without network: tests, benchmark, wheels
	scripts/gpu_bundle.sh

clean: ## remove .venv and caches of the tree; the model stays in the user's cache
	rm -rf .venv site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist
