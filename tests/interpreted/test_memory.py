"""Model Runner V2 where a GPU would differ: options in parts, memory of the heaviest step, the draft adapter's slot."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.interpreted.test_speculator import CASES, PROMPTS, _same_logprobs, ask, folders, start
from tests.support.engines import isd, proposer, tokens
from vllm_idlm.engine_args import DRAFT_LORA_ID
from vllm_idlm.v2 import memory, sampler
from vllm_idlm.v2.memory import Heaviest
from vllm_idlm.v2.sampler import chunks

__all__ = ["folders"]  # a fixture


@pytest.mark.parametrize(
    ("rows", "most", "parts"),
    [
        ([4, 4, 4], 12, [(0, 3)]),
        ([4, 4, 4], 8, [(0, 2), (2, 3)]),
        ([4, 0, 0, 4, 0], 4, [(0, 3), (3, 5)]),
        ([4, 9, 1, 1], 5, [(0, 1), (1, 2), (2, 4)]),
        ([4, 4], 1, [(0, 1), (1, 2)]),
        ([1], 5, [(0, 1)]),
    ],
)
def test_parts(rows, most, parts):
    assert [(part.start, part.stop) for part in chunks(np.array(rows), most)] == parts


def test_the_limit_is_vllms():
    """1 GiB of float32, a whole request at least."""
    assert sampler.get_max_chunk_logits(151_936) == 2**30 // (4 * 151_936) == 1766
    assert Heaviest.of(1024, 7, 4, 8192, 2**30).chunk == 4


@pytest.mark.parametrize(
    ("requests", "width", "tokens", "rows", "gib"),
    [
        (1024, 7, 8192, 7168, 3.53),
        (1024, 16, 16384, 16384, 6.14),
        (1024, 16, 8192, 8192, 3.82),
        (32, 7, 8192, 224, 0.17),
    ],
)
def test_the_heaviest_step_of_an_8b(requests, width, tokens, rows, gib):
    """bfloat16 logits of 151,936 tokens: up to `tokens` rows of them, and two copies of a part."""
    found = Heaviest.of(requests, width, 4, tokens, 151_936)
    assert found.rows == rows
    assert found.chunk == min(4 * requests, 1766)
    assert found.bytes(151_936, 2) / 2**30 == pytest.approx(gib, abs=0.01)


SEEDED = [{**case, "seed": i} for i, case in enumerate([*CASES, {"temperature": 0.9, "top_p": 0.8, "logprobs": 2}])]


@pytest.mark.vllm
@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_parts_and_the_whole_give_the_same(folders, monkeypatch, mode):
    """Tokens and log-probabilities, sampled and greedy, with options and without, 7 requests in parts of 6 rows."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(SEEDED))]
    llm = start(folders, True, max_num_seqs=7, logprobs_mode=mode)
    whole = ask(llm, prompts, 9, SEEDED)
    found, verify = [], sampler.verify_rows

    def noted(rows):
        found.append(len(rows.slot))
        assert rows.processed is None or len(rows.processed) <= 6
        return verify(rows)

    monkeypatch.setattr(sampler, "verify_rows", noted)
    monkeypatch.setattr(sampler, "get_max_chunk_logits", lambda vocabulary: 6)
    parts = ask(llm, prompts, 9, SEEDED)
    assert tokens(parts) == tokens(whole)
    for ours, theirs in zip(parts, whole, strict=True):
        _same_logprobs(ours.outputs[0].logprobs, theirs.outputs[0].logprobs)
    assert len(set(found)) > 2, "nothing was split"


class Peak(TorchDispatchMode):
    """The most bytes at a time that tensors made inside have taken."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._holders: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor):
                self._take(tensor)
        return made

    def _take(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._holders:
            self._holders[storage.data_ptr()] = 0
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
        self._holders[storage.data_ptr()] += 1
        weakref.finalize(tensor, self._drop, storage.data_ptr(), storage.nbytes())

    def _drop(self, address: int, size: int) -> None:
        self._holders[address] -= 1
        if not self._holders[address]:
            del self._holders[address]
            self.now -= size


@pytest.mark.vllm
@pytest.mark.parametrize("limit", [1766, 5])
def test_the_profile_counts_the_heaviest_step(folders, monkeypatch, limit):
    """What it takes and frees is what it says, and what a step of all requests with options takes, but for vLLM's and
    our small tensors (a vocabulary of 48 leaves them in sight)."""
    llm = start(folders, True, settings={"coverage": "all"}, seed=9)
    found = proposer(llm)
    for module in (sampler, memory):
        monkeypatch.setattr(module, "get_max_chunk_logits", lambda vocabulary: limit)
    with Peak() as profiled:
        memory.heaviest_step(found, torch.zeros(3, found.runner.model_config.get_hidden_size()))
    heaviest = Heaviest.of(3, 16, 4, 256, 48)
    assert heaviest == (48, min(12, limit))
    padded = 64 - 48  # columns of a row of logits that vLLM leaves out
    logits = heaviest.bytes(48, 4) + heaviest.rows * padded * 4
    assert logits <= profiled.most < 1.5 * logits
    verified, peaks = found.runner.rejection_sampler, []
    process = verified._process

    def measured(*args):
        with Peak() as peak:
            made = process(*args)
        peaks.append((len(made[0]), peak.most))
        return made

    monkeypatch.setattr(verified, "_process", measured)
    ask(llm, PROMPTS[:3], 12, [{"min_p": 0.1, "temperature": 1.0, "seed": 1}] * 3)
    rows, most = max(peaks)
    assert rows == heaviest.chunk - (heaviest.chunk % 4 if heaviest.chunk > 4 else 0)
    assert rows * 48 * 8 <= most < rows * 48 * 8 + 2000


@pytest.mark.vllm
def test_on_a_cpu_the_profile_takes_nothing(folders):
    """vLLM measures the process there."""
    found = proposer(start(folders, True, settings={"coverage": "all"}, seed=9))
    with Peak() as peak:
        found.profile(torch.zeros(3, 64))
    assert peak.most == 64 * 3 * 4


def pinned(runner):
    manager = runner.lora_manager._adapter_manager
    return manager._registered_adapters.pinned_items & manager._active_adapters.pinned_items


@pytest.mark.vllm
def test_the_draft_adapter_stays(folders):
    """vLLM drops all adapters between its warm-up and the first request; it may also come back without its pin."""
    found = proposer(start(folders, True))
    runner = found.runner
    assert runner.list_loras() == pinned(runner) == {DRAFT_LORA_ID}
    runner.maybe_remove_all_loras(runner.lora_config)
    assert runner.list_loras() == set()
    found.warm_up()
    assert runner.list_loras() == pinned(runner) == {DRAFT_LORA_ID}
    runner.maybe_remove_all_loras(runner.lora_config)
    runner.add_lora(found.draft_lora)
    assert pinned(runner) == set()
    found.warm_up()
    assert pinned(runner) == {DRAFT_LORA_ID}


@pytest.mark.vllm
def test_batch_invariance_is_no_reason_for_another_runner(folders, monkeypatch):
    """VLLM_BATCH_INVARIANT=1 gives equal answers at any batch on GPUs, to compare with plain decoding's: such an engine
    runs on V2, asynchronously, with the attention that vLLM prefers on an H100."""
    from vllm import EngineArgs
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    for config in (None, isd(4, mask_token_id=1, lora=folders[1]), isd(4, mask_token_id=1, coverage="auto")):
        args = EngineArgs(
            folders[0], dtype="bfloat16", speculative_config=config, skip_tokenizer_init=True, async_scheduling=True
        )
        found = args.create_engine_config()
        assert found.use_v2_model_runner
        assert config is None or found.scheduler_config.async_scheduling
    assert FlashAttentionBackend.supports_batch_invariance()
    assert FlashAttentionBackend.supports_compute_capability(DeviceCapability(9, 0))
