PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo bench test test-v1 test-v2 test-slow lint wheel clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

setup:  ## .venv with vLLM's CPU build and everything the demo and the tests need (a few minutes, once)
	@$(PYTHON) -I vllm_idlm/cpu_setup.py --venv $(VENV)

demo: setup  ## plain and strided decoding of the embedded model, side by side
	@$(BIN)/idlm demo

bench: setup  ## plain decoding, ISD and vLLM's other methods on the embedded model: a report with plots, under 20 minutes
	@$(BIN)/idlm bench smollm2 --fresh

test: setup  ## unit and integration tests on real vLLM (CPU), half an hour or so on 2 cores
	@$(MAKE) --no-print-directory -j2 --output-sync=target test-v1 test-v2

# One core each. V2 and the Triton kernels run under Triton's interpreter, in a process of their own.
test-v1:
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow"

test-v2:
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" tests/interpreted

test-slow: setup  ## the long tests: large samples, many prompts
	@$(BIN)/python -m pytest -m slow
	@$(BIN)/python -m pytest -m slow tests/interpreted

lint: setup  ## ruff: rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

wheel: setup  ## a wheel in dist/
	@$(BIN)/python -m build --wheel --no-isolation

clean:  ## remove build products and caches (.venv stays)
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
