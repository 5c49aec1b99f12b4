"""SmolLM2-135M-Instruct in Model Runner V2: greedy text equal to V1's and to plain decoding's, also under a grammar."""

from __future__ import annotations

import json
import os
import sys

import pytest

from tests.cases import SCHEMA, sampling
from tests.engines import MASK, engine, in_a_process, isd, stats, tokens

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]
PROMPTS = [
    "Write a haiku about the sea.",
    "What is the capital of France?",
    "Count from one to ten.",
    "Give me three tips for better sleep.",
    "Write a Python function that reverses a string.",
    "Why is the sky blue?",
    "What is 12 times 9? Show your work.",
    "Say hello to a new colleague.",
]
LENGTH = 32
OPTIONS = {"max_model_len": 128, "max_num_seqs": 3, "max_num_batched_tokens": 128}

_ON_V1 = """
import json, sys
from vllm import LLM, SamplingParams
model, options, config, prompts, length = json.loads(sys.argv[1])
llm = LLM(model, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=200_000_000, disable_log_stats=True,
          speculative_config=config, **options)
assert not llm.llm_engine.vllm_config.use_v2_model_runner
chats = [[{"role": "user", "content": p}] for p in prompts]
outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=length), use_tqdm=False)
print("FOUND", json.dumps([list(o.outputs[0].token_ids) for o in outputs]))
"""


def on_v1(model, config):
    """The same request to an engine on Model Runner V1, without Triton, in a process of its own."""
    given = json.dumps([model, OPTIONS, config, PROMPTS, LENGTH])
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "VLLM_USE_V2_MODEL_RUNNER")}
    env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return in_a_process([sys.executable, "-c", _ON_V1, given], env)


def ask(llm, prompts, params):
    return llm.chat([[{"role": "user", "content": p}] for p in prompts], params, use_tqdm=False)


def configs(adapter):
    return {"isd": isd(4, mask_token_id=MASK), "risd": isd(4, mask_token_id=MASK, lora=adapter)}


@pytest.fixture(scope="module")
def plain_v1(smol):
    return on_v1(smol, None)


def test_plain_decoding_is_the_same_on_both(smol, plain_v1):
    llm = engine(smol, **OPTIONS)
    assert [t[0] for t in tokens(ask(llm, PROMPTS, sampling({"max_tokens": LENGTH})))] == plain_v1


@pytest.mark.parametrize("method", [pytest.param("isd", marks=pytest.mark.slow), "risd"])
def test_greedy_text_is_plain_decodings(smol, adapter, plain_v1, method):
    """Eight prompts, three at a time, asynchronous scheduling."""
    config = configs(adapter)[method]
    assert on_v1(smol, config) == plain_v1
    llm = engine(smol, speculative_config=config, async_scheduling=True, **OPTIONS)
    stats(llm)
    assert [t[0] for t in tokens(ask(llm, PROMPTS, sampling({"max_tokens": LENGTH})))] == plain_v1
    assert stats(llm)["tpf"] > (1.1 if method == "risd" else 1.0)


def test_a_grammar_in_the_batch(smol, adapter):
    """A request with a JSON schema beside two without: the same text as plain decoding, and JSON."""
    params = [sampling({"max_tokens": 32, "json": SCHEMA}), sampling({"max_tokens": 24}), sampling({"max_tokens": 24})]
    prompts = ["Describe a person as JSON with name, age, city.", *PROMPTS[1:3]]
    want = ask(engine(smol, **OPTIONS), prompts, params)
    llm = engine(smol, speculative_config=configs(adapter)["risd"], async_scheduling=True, **OPTIONS)
    stats(llm)
    got = ask(llm, prompts, params)
    assert tokens(got) == tokens(want)
    assert got[0].outputs[0].text.lstrip().startswith("{")
    assert stats(llm)["tpf"] > 1.0, "no draft was accepted"
