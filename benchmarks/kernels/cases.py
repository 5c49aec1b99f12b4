"""Inputs of the step kernels at the shape of a decode batch, and vLLM's own kernels on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from vllm_idlm.kernels.draft import MaskRows, draft_rows
from vllm_idlm.kernels.gate import Batch, Gate, gate
from vllm_idlm.kernels.tail import Tail, tail_attention
from vllm_idlm.kernels.verify import Rows, verify_rows

from vllm_idlm.tail import places, views


class Case(NamedTuple):
    """One kernel on one batch."""

    name: str
    run: Callable[[], object]
    bytes: int  # that must move at least
    vllm: Callable[[], object] | None  # vLLM's own way to the same end


HEADS, KEY_HEADS, SIZE = 32, 8, 128  # of Qwen3-8B's attention


def make(batch: int, n: int, vocabulary: int, temperature: float, context: int, device: torch.device) -> list[Case]:
    """The kernels for `batch` requests with n - 1 drafts and n - 1 masks each, all drafts likely to pass.

    context: tokens of each request in the cache, for the attention of its extra groups.
    """
    most, width = n - 1, 2 * n - 1
    g = torch.Generator(device).manual_seed(0)
    logits = torch.randn(batch * width, vocabulary, generator=g, device=device).mul_(3).bfloat16()
    first = torch.arange(batch, device=device, dtype=torch.int32) * width
    slot = torch.arange(batch, device=device)
    counts = torch.full((batch,), most, dtype=torch.int32, device=device)
    proposal = logits.view(batch, width, -1)[:, :most].clone()
    drafts = logits.view(batch, width, -1)[:, :most].argmax(-1)
    position = torch.full((batch,), 500, device=device)
    warmth = torch.full((batch,), temperature, device=device)
    seeds = torch.arange(batch, device=device) * 7919
    rows = Rows(logits, first, counts, drafts, position, slot, warmth, seeds, proposal)
    masks = MaskRows(logits, first + n, counts, position + n, slot, warmth, seeds, 0)
    room = torch.empty_like(drafts)
    row = vocabulary * logits.element_size()
    verified = batch * row * ((n + most + 2) if temperature else n)
    drafted = batch * row * most * (2 if temperature else 1)
    ends = torch.arange(batch + 1, device=device, dtype=torch.int32) * width
    layout = Batch(ends, ends, counts + 500, torch.full_like(counts, 100), slot, counts.clone())
    out = Gate(*(torch.empty(batch * width, dtype=torch.int64, device=device) for _ in range(4)))
    out = out._replace(drafts=torch.empty_like(counts), masks=torch.empty_like(counts))
    return [
        Case("verify", lambda: verify_rows(rows), verified, _vllm_verify(rows, n, ends)),
        Case("draft", lambda: draft_rows(masks, room, proposal), drafted, _vllm_draft(masks, proposal)),
        Case("gate", lambda: gate(layout, counts, 3, out), batch * width * 16, None),
        _tail(batch, n, context, device),
    ]


def _tail(batch: int, n: int, context: int, device: torch.device) -> Case:
    """One layer's attention of n - 1 extra groups a request; the keys and values of the context move once."""
    block, width = 32, n * n
    blocks = -(-(context + width) // block)
    cache = torch.randn(batch * blocks, KEY_HEADS, block, 2 * SIZE, device=device).bfloat16()
    keys, values = views(cache)
    query = torch.randn(batch * width, HEADS, SIZE, device=device).bfloat16()
    place = places(2 * n - 1, tuple((j, n - 1) for j in range(n - 1)))
    fields = [place.row, context + place.visible, context + place.own_first, context + place.row + 1]
    each = torch.tensor(np.stack(fields), device=device, dtype=torch.int32).unsqueeze(1).repeat(1, batch, 1)
    each[0] += torch.arange(batch, device=device, dtype=torch.int32).unsqueeze(1) * width
    table = torch.arange(batch * blocks, device=device, dtype=torch.int32).view(batch, blocks)
    starts = torch.arange(batch + 1, device=device, dtype=torch.int32) * len(place.row)
    rows, output = Tail(table, starts, each.flatten(1).contiguous(), len(place.row)), torch.empty_like(query)
    moved = batch * (context + width) * KEY_HEADS * 2 * SIZE * 2
    return Case("tail", lambda: tail_attention(output, query, keys, values, rows, SIZE**-0.5), moved, None)


def _vllm_verify(rows: Rows, n: int, ends: torch.Tensor) -> Callable[[], object] | None:
    """vLLM's rejection_sample on the same drafts and q (it wants the rows of x, d1..d(n-1) side by side)."""
    if not rows.logits.is_cuda:
        return None
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

    batch, most = rows.drafts.shape
    width = 2 * n - 1
    logits = rows.logits.view(batch, width, -1)[:, :n].reshape(batch * n, -1)
    # With a temperature vLLM's chain verifies a float32 copy of the rows, made by apply_sampling_params.
    starts = torch.arange(batch + 1, device=ends.device, dtype=torch.int32) * n
    tokens = torch.cat([rows.drafts.new_zeros(batch, 1), rows.drafts], 1).flatten()
    place = torch.arange(n, device=ends.device, dtype=torch.int32).repeat(batch)
    owner = rows.slot.repeat_interleave(n)
    at = rows.position.repeat_interleave(n) + place
    return lambda: rejection_sample(
        logits.float(), rows.proposal, tokens, starts, at, rows.slot, owner, place, rows.temperature, rows.seed, most
    )


def _vllm_draft(rows: MaskRows, proposal: torch.Tensor) -> Callable[[], object] | None:
    """vLLM's gumbel_sample with its cache of q."""
    if not rows.logits.is_cuda:
        return None
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

    most = proposal.shape[1]
    place = torch.arange(most, device=rows.logits.device)
    index = (rows.first_row.unsqueeze(1) + place).flatten()
    owner, at = rows.slot.repeat_interleave(most), (rows.position.unsqueeze(1) + place).flatten()
    column = place.repeat(len(rows.slot)).int()
    return lambda: gumbel_sample(
        rows.logits[index], owner, rows.temperature, rows.seed, at, apply_temperature=True, is_drafting=True,
        logits_cache=proposal, logits_cache_col=column,
    )  # fmt: skip
