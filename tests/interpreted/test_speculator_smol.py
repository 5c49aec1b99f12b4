"""SmolLM2-135M-Instruct in Model Runner V2: greedy text equal to V1's and to plain decoding's, also under a grammar."""

from __future__ import annotations

import json
import os
import sys

import pytest

from tests.support.cases import SCHEMA, sampling
from tests.support.engines import MASK, engine, in_a_process, isd, stats, tokens

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
SIZES = pytest.mark.parametrize(  # prompts, three at a time, and tokens of each answer
    ("count", "length"), [(3, 9), pytest.param(8, 32, marks=pytest.mark.slow)], ids=["3 prompts", "8 prompts"]
)
OPTIONS = {"max_model_len": 128, "max_num_seqs": 3, "max_num_batched_tokens": 128}

_ON_V1 = """
import json, sys
from vllm import LLM, SamplingParams
model, options, configs, prompts, length = json.loads(sys.argv[1])
chats, found = [[{"role": "user", "content": p}] for p in prompts], []
for config in configs:
    llm = LLM(model, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=200_000_000, disable_log_stats=True,
              speculative_config=config, **options)
    assert not llm.llm_engine.vllm_config.use_v2_model_runner
    outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=length), use_tqdm=False)
    found.append([list(o.outputs[0].token_ids) for o in outputs])
    del llm
print("FOUND", json.dumps(found))
"""


def on_v1(model, configs, count, length):
    """The answers of engines on Model Runner V1, without Triton, in a process of their own, engine by engine."""
    given = json.dumps([model, OPTIONS, configs, PROMPTS[:count], length])
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "VLLM_USE_V2_MODEL_RUNNER")}
    env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return in_a_process([sys.executable, "-c", _ON_V1, given], env)


def ask(llm, prompts, params):
    return llm.chat([[{"role": "user", "content": p}] for p in prompts], params, use_tqdm=False)


def configs(adapter):
    return {"isd": isd(4, mask_token_id=MASK), "risd": isd(4, mask_token_id=MASK, lora=adapter)}


@SIZES
def test_greedy_text_is_plain_decodings(smol, adapter, count, length):
    """Without ISD, with it and with the adapter, asynchronous scheduling; the same as on Model Runner V1."""
    methods = {"plain": None, **configs(adapter)}
    if count < len(PROMPTS):
        del methods["isd"]
    params = sampling({"max_tokens": length})
    want, *others = on_v1(smol, list(methods.values()), count, length)
    assert others == [want] * len(others)
    for method, config in methods.items():
        more = {"speculative_config": config, "async_scheduling": True} if config else {}
        llm = engine(smol, **more, **OPTIONS)
        if config:
            stats(llm)
        assert [t[0] for t in tokens(ask(llm, PROMPTS[:count], params))] == want, method
        if config:
            assert stats(llm)["tpf"] > (1.1 if method == "risd" else 1.0)


def test_a_grammar_in_the_batch(smol, adapter):
    """A request with a JSON schema beside two without: the same text as plain decoding, and JSON."""
    params = [sampling({"max_tokens": 20, "json": SCHEMA}), sampling({"max_tokens": 12}), sampling({"max_tokens": 12})]
    prompts = ["Describe a person as JSON with name, age, city.", *PROMPTS[1:3]]
    want = ask(engine(smol, **OPTIONS), prompts, params)
    llm = engine(smol, speculative_config=configs(adapter)["risd"], async_scheduling=True, **OPTIONS)
    stats(llm)
    got = ask(llm, prompts, params)
    assert tokens(got) == tokens(want)
    assert got[0].outputs[0].text.lstrip().startswith("{")
    assert stats(llm)["tpf"] > 1.0, "no draft was accepted"
