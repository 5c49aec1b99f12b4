"""Tensor parallelism on Model Runner V1, real ranks: processes of vLLM's (mp) and actors of Ray.

Greedy answers are those of one rank, in float32, and all ranks hold the same record of what was drafted and accepted.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.engines import in_a_process, python_path
from tests.support.tp_script import PROMPTS

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]
ROOT = Path(__file__).resolve().parents[2]


def found(ranks=1, backend=None, **options):
    """What tests/support/tp_script.py prints for an engine with these options."""
    cores = os.cpu_count() or 1
    bind = "|".join(str(rank % cores) for rank in range(ranks)) if cores > 1 else "nobind"
    env = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": bind, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    env["PYTHONPATH"] = python_path(ROOT)
    if ranks > 1:
        options |= {"tensor_parallel_size": ranks, "distributed_executor_backend": backend}
    given = {
        "dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 50_000_000, "max_model_len": 128,
        "max_num_seqs": 4, "max_num_batched_tokens": 128, "skip_tokenizer_init": True, "disable_log_stats": True,
    }  # fmt: skip
    script = str(ROOT / "tests" / "support" / "tp_script.py")
    return in_a_process([sys.executable, script, json.dumps({**given, **options})], env)


def greedy(model):
    """Plain greedy decoding of the prompts by transformers."""
    import torch

    network, answers = tiny.load_tiny(model), []
    for prompt in PROMPTS:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(20):
                ids.append(int(network(torch.tensor([ids])).logits[0, -1].argmax()))
        answers.append(ids[len(prompt) :])
    return answers


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Qwen3 with random weights, and a random adapter for it."""
    folder = tmp_path_factory.mktemp("tp")
    path = tiny.write_tiny(folder / "model")
    return str(path), str(tiny.write_adapter(folder / "draft", path, scale=0.5))


def check(result, expected, ranks):
    answers = result["answers"]
    assert answers["greedy"] == answers["without isd"] == expected
    assert len(result["ranks"]) == ranks
    records = [{k: v for k, v in rank.items() if k != "seconds"} for rank in result["ranks"]]
    assert all(record == records[0] for record in records), "ranks drafted or accepted differently"
    assert records[0]["trace"]
    assert records[0]["accepted_all"] + records[0]["rejected"] > 10
    assert answers["seeded"] != answers["greedy"] != answers["unseeded"]


def isd(draft=None, **more):
    return {
        "method": "isd",
        "n": 4,
        "mask_token_id": 1,
        "coverage": "all",
        **({"lora": draft} if draft else {}),
        **more,
    }


@pytest.mark.parametrize("backend", [pytest.param("mp", marks=pytest.mark.slow), "ray"])
def test_two_ranks_with_a_gated_adapter(model, backend):
    path, draft = model
    if backend == "ray":
        pytest.importorskip("ray")
    check(found(2, backend, model=path, speculative_config=isd(draft)), greedy(path), 2)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["mp", "ray"])
def test_two_ranks_without_an_adapter(model, backend):
    path, _ = model
    check(found(2, backend, model=path, speculative_config=isd()), greedy(path), 2)


@pytest.mark.slow
def test_two_ranks_of_plain_decoding(model):
    path, _ = model
    assert found(2, "mp", model=path)["answers"]["greedy"] == greedy(path)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["mp", "ray"])
def test_three_ranks_of_the_embedded_model(smol, adapter, backend):
    """SmolLM2 has 9 heads and 3 for keys: three ranks. Compared with one rank, with the trained adapter."""
    options = {"model": smol, "skip_tokenizer_init": False}
    speculative = {"speculative_config": isd(adapter, mask_token_id=16)}
    one = found(1, **options, **speculative)
    three = found(3, backend, **options, **speculative, **({"ray_cpus": 3} if backend == "ray" else {}))
    check(three, one["answers"]["greedy"], 3)
    assert one["answers"]["greedy"] == one["answers"]["without isd"]


@pytest.mark.slow
def test_more_ranks_than_rays_cpus_are_refused(model):
    """vLLM would wait for them for half an hour."""
    pytest.importorskip("ray")
    path, draft = model
    with pytest.raises(AssertionError, match=r"tensor_parallel_size=2 on Ray: 2 ranks .* and Ray has 1"):
        found(2, "ray", model=path, speculative_config=isd(draft), ray_cpus=1)


def test_pipeline_parallelism_is_refused(model):
    """At once, before any rank is started."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_idlm.settings import SettingsError

    args = EngineArgs(model[0], pipeline_parallel_size=2, speculative_config=isd(), skip_tokenizer_init=True)
    with pytest.raises(SettingsError, match="pipeline_parallel_size=2"):
        args.create_engine_config()


def test_flags_win_over_the_zoos_ranks_and_backend():
    from vllm.engine.arg_utils import EngineArgs

    from vllm_idlm.engine_args import apply_zoo

    zoos = EngineArgs("idlm-32b")
    own = EngineArgs("idlm-32b", tensor_parallel_size=4, distributed_executor_backend="mp")
    apply_zoo(zoos)
    apply_zoo(own)
    assert (zoos.tensor_parallel_size, zoos.distributed_executor_backend) == (2, "ray")
    assert (own.tensor_parallel_size, own.distributed_executor_backend) == (4, "mp")
    assert zoos.gpu_memory_utilization == own.gpu_memory_utilization == 0.9


@pytest.mark.slow
def test_auto_coverage_is_last_with_several_ranks(model):
    """Ranks would choose by clocks of their own."""
    path, draft = model
    result = found(2, "mp", model=path, speculative_config=isd(draft, coverage="auto"))
    check(result, greedy(path), 2)
