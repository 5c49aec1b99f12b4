"""The prefix cache holds what plain decoding would put there: no key or value of a mask or of a rejected draft.

The cache itself is read: after every step, each block that has a hash, against the same tokens' block in an engine
without ISD. A later forward overwrites what one block too many held for a step, so the end alone would not do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.support import tiny
from tests.support.engines import engine, isd, stats

pytestmark = pytest.mark.vllm
N, MASK, BLOCK, BLOCKS, LENGTH = 4, 1, 32, 61, 36
OPTIONS = {
    "skip_tokenizer_init": True,
    "max_model_len": 128,
    "max_num_seqs": 3,
    "max_num_batched_tokens": 256,
    "block_size": BLOCK,
    "num_gpu_blocks_override": BLOCKS,  # a number that no other dimension has
}
TEXT = [(7 * i * i + 3 * i + i // 5) % 46 + 2 for i in range(90)]
# Prompts whose masks stand in the block of the prompt's end, over its edge, and in a block of their own.
PROMPTS = [TEXT[start : start + length] for start, length in ((0, 29), (1, 31), (2, 32), (3, 62), (4, 1), (5, 64))]

Seen = list[tuple[tuple[int, ...], torch.Tensor]]  # the tokens up to a block's end, its keys and values


class Cache:
    """The prefix cache of an in-process engine, read by the tokens that its blocks stand for."""

    def __init__(self, llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        assert llm.reset_prefix_cache()
        core = llm.llm_engine.engine_core.engine_core
        self.llm, self.manager, self.requests = llm, core.scheduler.kv_cache_manager, []
        self.tensors = core.model_executor.driver_worker.worker.model_runner.kv_caches
        add = core.scheduler.add_request
        monkeypatch.setattr(core.scheduler, "add_request", lambda one: (self.requests.append(one), add(one)))

    @property
    def map(self) -> Any:
        """vLLM's map of hashes to blocks; a reset makes a new one."""
        return self.manager.block_pool.cached_block_hash_to_block

    def hashed(self) -> Iterator[tuple[Any, Any]]:
        """Every hash with every block that is cached under it."""
        for key, held in self.map._cache.items():
            yield from ((key, block) for block in (held.values() if isinstance(held, dict) else [held]))

    def read(self) -> Seen:
        """What is cached now. KeyError: a hash that is not of a request's own tokens."""
        from vllm.v1.core.kv_cache_utils import get_block_hash

        tokens = {
            found: tuple(request.all_token_ids[: (i + 1) * BLOCK])
            for request in self.requests
            for i, found in enumerate(request.block_hashes)
        }
        return [(tokens[get_block_hash(key)], self.values(block.block_id)) for key, block in self.hashed()]

    def values(self, block: int) -> torch.Tensor:
        """A block's keys and values in all layers, in the order in which they lie there."""
        parts = []
        for tensor in self.tensors:
            (axis,) = (i for i, size in enumerate(tensor.shape) if size == BLOCKS)
            parts.append(tensor.select(axis, block).flatten())
        return torch.cat(parts).clone()

    def answer(self, prompts: list[list[int]], length: int) -> tuple[list[list[int]], Seen]:
        """Greedy answers, and what was cached after each step."""
        self.begin(prompts, length)
        return self.finish()

    def begin(self, prompts: list[list[int]], length: int) -> None:
        """Hand over requests, called 0, 1, ..."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
        for i, prompt in enumerate(prompts):
            self.llm.llm_engine.add_request(str(i), {"prompt_token_ids": prompt}, params)

    def finish(self) -> tuple[list[list[int]], Seen]:
        """Run until all are answered."""
        done, seen, run = {}, [], self.llm.llm_engine
        while run.has_unfinished_requests():
            done |= {int(o.request_id): list(o.outputs[0].token_ids) for o in run.step() if o.finished}
            seen += self.read()
        return [done[i] for i in sorted(done)], seen


def plain(folders, monkeypatch) -> tuple[list[list[int]], dict[tuple[int, ...], torch.Tensor]]:
    """Answers of an engine without ISD, and its keys and values by the tokens up to a block's end."""
    cache = Cache(engine(folders[0], **OPTIONS), monkeypatch)
    answers, _ = cache.answer(PROMPTS, LENGTH)
    _, seen = cache.answer([prompt + answer for prompt, answer in zip(PROMPTS, answers, strict=True)], 1)
    return answers, dict(seen)


def faults(seen: Seen, want: dict[tuple[int, ...], torch.Tensor]) -> list[int]:
    """The blocks of `seen` that hold something else than plain decoding's, by the place of their end."""
    return [len(tokens) for tokens, found in seen if not torch.allclose(found, want[tokens], rtol=1e-3, atol=1e-4)]


def holds_what_plain_decoding_would(llm: Any, folders, monkeypatch) -> None:
    """The test, of an engine with ISD."""
    answers, want = plain(folders, monkeypatch)
    cache = Cache(llm, monkeypatch)
    llm.collective_rpc("isd_trace", args=(True,))
    stats(llm)
    found, seen = cache.answer(PROMPTS, LENGTH)
    counted = stats(llm)
    llm.collective_rpc("isd_trace", args=(False,))
    assert found == answers
    assert faults(seen, want) == []
    assert {tokens for tokens, _ in seen} >= {tuple((p + a)[:BLOCK]) for p, a in zip(PROMPTS, answers, strict=True)}
    assert {len(tokens) for tokens, _ in seen} == {BLOCK, 2 * BLOCK, 3 * BLOCK}
    firsts = [forwards[0] for forwards in counted["trace"].values()]
    assert [len(first["drafts"]) for first in firsts] == [N - 1] * len(PROMPTS), "no masks stood behind the prompts"
    assert counted["rejected"] > 5


def finds_a_block_cached_too_early(llm: Any, folders, monkeypatch) -> None:
    """That the test can fail: masks stand where three tokens of the answer will be when their block gets its hash."""
    _, want = plain(folders, monkeypatch)
    cache = Cache(llm, monkeypatch)
    _, seen = cache.answer(PROMPTS[:1], LENGTH)
    assert {len(tokens) for tokens, _ in seen} == {BLOCK, 2 * BLOCK}
    key = next(key for key, _ in cache.hashed() if cache.requests[0].block_hashes[0] in key)
    assert llm.reset_prefix_cache()
    cache.begin(PROMPTS[:1], LENGTH)
    llm.llm_engine.step()
    assert cache.read() == [], "the prompt alone does not fill a block"
    block = cache.manager.get_blocks(cache.requests[-1].request_id).blocks[0][0]
    cache.map.insert(key, block)
    assert faults(cache.read(), want) == [BLOCK]
    cache.map.pop(key, block.block_id)
    assert faults(cache.finish()[1], want) == []


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("prefix")
    model = tiny.write_tiny(root / "model", vocab=48)
    return str(model), str(tiny.write_adapter(root / "draft", model, scale=0.5))


def start(folders, coverage, gated=True, **options):
    """An engine with ISD."""
    config = isd(N, mask_token_id=MASK, coverage=coverage, **({"lora": folders[1]} if gated else {}))
    return engine(folders[0], speculative_config=config, **OPTIONS, **options)


@pytest.mark.parametrize(("coverage", "gated"), [("last", True), ("all", True), ("all", False)])
def test_cached_blocks_hold_what_plain_decoding_would(folders, coverage, gated, monkeypatch):
    holds_what_plain_decoding_would(start(folders, coverage, gated), folders, monkeypatch)


@pytest.mark.parametrize("coverage", ["last", "all"])
def test_a_block_cached_too_early_is_found(folders, coverage, monkeypatch):
    finds_a_block_cached_too_early(start(folders, coverage), folders, monkeypatch)
