# `make` alone lists what a developer can do.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One thread each: the tests start many processes, and idle BLAS pools only fight for cores.
export OPENBLAS_NUM_THREADS := 1
export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test lint check format sim prove failpoints soak chaos chaos-hour bench bench-recall lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

$(BIN)/.installed: pyproject.toml scripts/setup.sh requirements.lock
	@PYTHON=$(PYTHON) VENV=$(VENV) sh scripts/setup.sh
	@touch $@

setup: $(BIN)/.installed ## make the virtual environment and fetch the embedding model

demo: setup ## three nodes, a leader killed, one cut off, a fourth joins, everything still found
	@$(BIN)/agentmem demo

serve: setup ## one node on 127.0.0.1:7700, data in ./data
	@$(BIN)/agentmem serve --data data

test: setup lint check ## everything that CI runs
	@$(BIN)/python scripts/run_tests.py

lint: setup ## ruff: style and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

check: setup ## mypy --strict over the four packages
	@sh scripts/typecheck.sh $(BIN)

format: setup ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

sim: setup ## 600 simulated worlds with faults: 10 virtual hours
	@$(BIN)/agentmem-chaos sim --worlds 600

prove: setup ## take each protection away in the simulator, and count worlds until it is missed
	@$(BIN)/agentmem-chaos prove

failpoints: setup ## end real nodes at every failpoint, under load (ten minutes)
	@AGENTMEM_TEST_FAILPOINTS=all $(BIN)/python -m pytest tests/failpoints

soak: setup ## 60,000 simulated worlds: 1,000 virtual hours
	@$(BIN)/agentmem-chaos sim --worlds 60000

chaos: setup ## real nodes under real faults for a minute, with a timeline
	@$(BIN)/agentmem-chaos run kills --seconds 60

chaos-hour: setup ## an hour of every kind of fault, mixed, on four real nodes
	@$(BIN)/agentmem-chaos run everything --seconds 3600

bench: setup ## the figures of the README, beside chroma and etcd (half an hour)
	@$(BIN)/pip install --quiet -e '.[node,test,bench]'
	@$(BIN)/python -m benchmarks.run

bench-recall: setup ## retrieval quality: make bench-recall DATA=conversations.json
	@$(BIN)/python benchmarks/recall.py $(DATA)

lock: ## pin the versions that CI uses
	@$(BIN)/python scripts/lock.py > requirements.lock

clean: ## remove what the targets above made, but not ./data
	rm -rf $(VENV) .typecheck .mypy_cache .ruff_cache .pytest_cache build *.egg-info
