# Every target sets up what it needs: a virtual environment in $(VENV), made anew when the pins change.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test lint bench chaos soak verify clean

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
JOBS ?= 2

help:  ## what there is to make
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

$(STAMP): pyproject.toml constraints.txt scripts/setup
	scripts/setup $(VENV)

demo: $(STAMP)  ## a picture from the embedded model, in out/demo.png
	@mkdir -p out
	$(BIN)/triptych generate "a red apple on the left, blue background" --seed 7 -o out/demo.png
	@echo "The picture is in $(CURDIR)/out/demo.png"

test: $(STAMP)  ## the tests: CPU only, no network
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: $(STAMP)  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(STAMP)  ## the benchmarks: figure, target, met; fails on a miss
	$(BIN)/python benchmarks/generate.py
	$(BIN)/python benchmarks/layout.py
	$(BIN)/python benchmarks/transfer.py
	$(BIN)/python benchmarks/serving.py

chaos: $(STAMP)  ## every fault at every moment, then 300 jobs in a storm of them: none lost, all bit-equal
	$(BIN)/python -m tests.chaos

soak: $(STAMP)  ## 20,000 requests with cancels, errors and clients that leave: nothing grows, none lost
	$(BIN)/python -m tests.soak

verify: $(STAMP)  ## the long checks: slow tests, chaos, soak, the embedded model's full grading, the benchmarks
	$(BIN)/python -m pytest -m slow || test $$? -eq 5
	$(BIN)/python -m tests.chaos
	$(BIN)/python -m tests.soak
	$(BIN)/python -m training.grade --model emoji
	$(BIN)/python benchmarks/generate.py
	$(BIN)/python benchmarks/layout.py
	$(BIN)/python benchmarks/transfer.py
	$(BIN)/python benchmarks/serving.py

clean:  ## removes what the other targets made
	rm -rf $(VENV) out build dist .pytest_cache .ruff_cache
	find src tests benchmarks training -name __pycache__ -type d -prune -exec rm -rf {} +
