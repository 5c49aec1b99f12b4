"""Tensor parallelism on Model Runner V2: two ranks agree on drafts and verdicts without a word between them.

Every rank has all logits (vLLM gathers them) and draws its noise by counter from the request's seed, so all ranks
draft, accept and emit the same tokens.
"""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch

from tests.support import tiny
from tests.support.engines import engine, in_a_process, python_path, tokens

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

_SCRIPT = """
import json, sys
import tests.interpreted.conftest
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    llm = LLM(given["model"], dtype="float32", enforce_eager=True, kv_cache_memory_bytes=50_000_000, max_model_len=128,
              max_num_seqs=3, max_num_batched_tokens=128, skip_tokenizer_init=True, disable_log_stats=True,
              **given["options"])
    assert llm.llm_engine.vllm_config.use_v2_model_runner
    found = []
    for temperature, seed in ((0, None), (0.8, 5)):
        params = SamplingParams(temperature=temperature, seed=seed, max_tokens=given["length"], ignore_eos=True,
                                detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": p} for p in given["prompts"]], params, use_tqdm=False)
        found.append([list(o.outputs[0].token_ids) for o in outputs])
    stats = llm.collective_rpc("isd_stats") if "speculative_config" in given["options"] else []
    print("FOUND", json.dumps([found, [s["accepted_all"] + s["rejected"] for s in stats if s]]))
"""
PROMPTS = [[3, 7, 11, 2], [5, 5, 9], [1, 2, 3, 4, 5, 6, 7, 8], [13]]


def answers(script, model, length, **options):
    """Greedy and sampled answers of an engine in processes of its own, and how many forwards verified drafts."""
    given = json.dumps({"model": model, "options": options, "prompts": PROMPTS, "length": length})
    ranks = "0|1" if options.get("tensor_parallel_size", 1) > 1 and (os.cpu_count() or 1) > 1 else "nobind"
    # The compiler would look for a real Triton behind the interpreter's stand-in.
    env = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": ranks, "TORCHDYNAMO_DISABLE": "1"}
    env["PYTHONPATH"] = python_path(os.getcwd())
    script.write_text(_SCRIPT)  # a file: workers import it again, and with it the stand-in
    return in_a_process([sys.executable, str(script), given], env)


def one_rank(model, length, **options):
    """The same answers of an engine in this process."""
    from vllm import SamplingParams

    sizes = {"max_model_len": 128, "max_num_seqs": 3, "max_num_batched_tokens": 128, "skip_tokenizer_init": True}
    llm, prompts = engine(model, **sizes, **options), [{"prompt_token_ids": p} for p in PROMPTS]
    common = {"max_tokens": length, "ignore_eos": True, "detokenize": False}
    ways = (SamplingParams(temperature=0, **common), SamplingParams(temperature=0.8, seed=5, **common))
    return [[t[0] for t in tokens(llm.generate(prompts, way, use_tqdm=False))] for way in ways]


def greedy(model, length):
    """Plain greedy decoding by transformers."""
    found, network = [], tiny.load_tiny(model)
    for prompt in PROMPTS:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(length):
                ids.append(int(network(torch.tensor([ids])).logits[0, -1].argmax()))
        found.append(ids[len(prompt) :])
    return found


@pytest.mark.parametrize(
    ("coverage", "length"),
    [("all", 8), *(pytest.param(c, 20, marks=pytest.mark.slow) for c in ("last", "auto", "all"))],
)
def test_two_ranks(tmp_path, coverage, length):
    script = tmp_path / "script.py"
    model = str(tiny.write_tiny(tmp_path / "model", vocab=48))
    draft = str(tiny.write_adapter(tmp_path / "draft", model, scale=0.5))
    isd = {
        "speculative_config": {"method": "isd", "n": 4, "mask_token_id": 1, "lora": draft, "coverage": coverage},
        "async_scheduling": True,
    }
    two_ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    two, verified = answers(script, model, length, **isd, **two_ranks)
    assert two[0] == greedy(model, length)
    assert two == one_rank(model, length, **isd)
    assert verified[0] > 10
