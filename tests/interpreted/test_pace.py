"""`"coverage": "auto"` on Model Runner V2: the scheduler's choice of how wide rows are changes no token."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import numpy as np
import pytest
from vllm_idlm.proposers.coverage import Choice
from vllm_idlm.proposers.estimates import Acceptance, Cost

import vllm_idlm.v2.pace as pace_module
from tests.interpreted.test_speculator import PROMPTS, ask, folders, plain, start
from tests.support.engines import python_path, stats, tokens, told

pytestmark = pytest.mark.vllm
__all__ = ["folders"]  # a fixture


@pytest.fixture(scope="module")
def auto(folders):
    """An engine under auto with the gated adapter; what it learnt at start stays in `pace.cost`."""
    return start(folders, True, settings={"coverage": "auto"})


@pytest.fixture
def pace(auto):
    """The engine's Pace with its estimates new, its clock stopped; put back afterwards."""
    found = auto.llm_engine.engine_core.engine_core.scheduler.isd_pace
    kept = found.cost
    found.acceptance, found.choice = Acceptance(3), None
    yield found
    found.cost = kept


@pytest.fixture
def widths(pace, monkeypatch):
    """Slots of the rows that were scheduled, as they come."""
    seen, observe = [], pace.observe

    def noted(scheduled, output):
        seen.extend(
            len(scheduled.scheduled_spec_decode_tokens.get(name, ())) for name in scheduled.num_scheduled_tokens
        )
        observe(scheduled, output)

    monkeypatch.setattr(pace, "observe", noted)
    return seen


def any_width(monkeypatch):
    """Choices at random, every step."""
    draw = random.Random(0)

    def choose(acceptance, cost, requests, most, widths, plain=True):
        whole = len(acceptance) + 1
        stride = draw.choice([*range(1, whole + 1), whole])
        return Choice(stride, tuple(range(draw.randint(0, most))) if stride == whole else (), 1.0, 0.0, 0.0)

    monkeypatch.setattr(pace_module, "choose_width", choose)
    monkeypatch.setattr(pace_module.Pace, "_EVERY", 1)


def test_what_it_starts_from(auto, pace):
    """What workers measured has come to the scheduler, and rows may have all groups."""
    assert isinstance(pace.cost, Cost)
    assert pace._most == 3
    assert auto.llm_engine.vllm_config.speculative_config.num_speculative_tokens == 15
    assert 0 < pace.cost(1, False) < 60


def test_rows_of_any_width_change_no_token(auto, widths, folders, monkeypatch):
    want = tokens(ask(plain(folders), PROMPTS))
    any_width(monkeypatch)
    stats(auto)
    assert tokens(ask(auto, PROMPTS)) == want
    assert sum(stats(auto)["accepted_per_position"]) > 0, "no draft was ever accepted"
    assert {0, 2, 4, 6, 9, 12, 15} <= set(widths)


def test_free_rows_carry_all_groups_and_dear_rows_none(auto, pace, widths):
    for cost, width in ((lambda rows, masked: 1.0, 15), (lambda rows, masked: rows, 0)):
        pace.cost, pace.choice = told(cost), None
        widths.clear()
        ask(auto, PROMPTS[:3], 20)
        # Behind a prompt stand n - 1 masks; the last rows of an answer are cut.
        assert max(widths) == max(width, 3)
        assert widths.count(width) > len(widths) / 2


def test_a_seeded_request_has_one_text(auto, pace, monkeypatch):
    """Its text does not depend on what clocks and company make of the widths: rows are n's chain while it runs."""
    seeded = {"temperature": 0.9, "seed": 11}
    alone = tokens(ask(auto, PROMPTS[:1], 24, [seeded]))
    any_width(monkeypatch)
    again = tokens(ask(auto, PROMPTS[:1], 24, [seeded]))
    beside = tokens(ask(auto, PROMPTS[:3], 24, [seeded, {"temperature": 1.0}, {}]))
    assert alone == again == beside[:1]


def test_a_seed_without_noise_leaves_the_choice(auto, pace, widths):
    """A greedy request's text is the same whatever the widths, seed or not."""
    pace.cost = told(lambda rows, masked: 1.0)
    ask(auto, PROMPTS[:2], 24, [{"seed": 5}, {}])
    assert max(widths) == 15


def test_chunked_prompts_between_rows_of_any_width(folders, monkeypatch):
    """A prompt's last chunk has masks whatever the width was at its first: where vLLM wrote -1 stand masks again."""
    prompts = [p * 6 for p in PROMPTS]
    limits = {"max_num_batched_tokens": 48, "enable_prefix_caching": False}
    want = tokens(ask(plain(folders), prompts, 16))
    llm = start(folders, False, settings={"coverage": "auto"}, **limits)
    any_width(monkeypatch)
    assert tokens(ask(llm, prompts, 16)) == want


def test_vllms_warm_up_of_kernels(folders):
    """On GPUs vLLM runs it at start, by steps of its own making."""
    from vllm.v1.worker.gpu.warmup import warmup_kernels

    llm = start(folders, True, settings={"coverage": "auto"}, seed=3)
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    warmup_kernels(worker.model_runner, worker.execute_model, worker.sample_tokens)
    assert tokens(ask(llm, PROMPTS[:2], 6)) == tokens(ask(plain(folders), PROMPTS[:2], 6))


def test_an_engine_in_a_spawned_process_has_its_measurements(folders, tmp_path):
    """There plugins are loaded while EngineCore.__init__ runs already, as under `vllm serve`."""
    script = tmp_path / "script.py"
    script.write_text(_SPAWNED)
    more = {"VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    more |= {"TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": python_path(os.getcwd()), "VLLM_LOGGING_LEVEL": "INFO"}
    env = {**os.environ, **more}
    done = subprocess.run([sys.executable, str(script), *folders], env=env, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    assert "the scheduler chooses how wide rows are, with up to 3 extra groups" in said
    assert "no worker said what rows cost" not in said


_SPAWNED = """
import sys
import tests.interpreted.conftest
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    isd = {"method": "isd", "n": 4, "mask_token_id": 1, "lora": sys.argv[2]}
    llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, kv_cache_memory_bytes=50_000_000, max_model_len=128,
              max_num_seqs=3, max_num_batched_tokens=128, skip_tokenizer_init=True, speculative_config=isd)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False)
    assert len(llm.generate([{"prompt_token_ids": [3, 7, 11]}], params)[0].outputs[0].token_ids) == 6
"""


def test_acceptance_comes_home(auto, pace):
    """The scheduler's counts are the device's, but for forwards in flight when their request had ended."""
    pace.cost = told(lambda rows, masked: 1.0)
    pace.acceptance = Acceptance(3, keep=1.0)
    stats(auto)
    ask(auto, PROMPTS, 30)
    ours, (accepted, tried) = stats(auto), pace.acceptance._counts.sum(1).T
    assert tried[0] > 10
    assert 0 <= ours["drafted_per_position"][0] - tried[0] <= len(PROMPTS) * 3
    assert np.all(accepted <= ours["accepted_per_position"])
    assert sum(accepted) > 0


def test_time_between_steps_is_learnt(auto, pace):
    """From decoding steps alone, by their rows."""
    seen = []
    pace.cost = told(lambda rows, masked: 1.0)
    pace.cost.observe = lambda rows, masked, seconds: seen.append((rows, masked, seconds))
    ask(auto, PROMPTS[:1], 24)
    assert {rows for rows, masked, _ in seen if masked} >= {16}
    assert all(0 < seconds < 60 for *_, seconds in seen)
    assert not any(rows == len(PROMPTS[0]) + 3 for rows, *_ in seen), "a prompt was taken for a decoding step"
