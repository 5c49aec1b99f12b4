"""`draft_rows` in Triton: one launch over the mask rows' logits, each read once, and one that picks the winners."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.triton_utils import tl, triton
from vllm_idlm.kernels.argmax import best, store_best
from vllm_idlm.kernels.draft.rows import MaskRows
from vllm_idlm.kernels.noise import DRAFT
from vllm_idlm.kernels.noise import triton as noise

_DRAFT = tl.constexpr(DRAFT)
BLOCK = 8192 if noise.INTERPRETED else 1024


@triton.jit
def _race(
    values,
    indices,
    blocks,
    logits,
    logits_stride,
    first_row,
    counts,
    positions,
    slots,
    temperatures,
    seeds,
    proposal,
    proposal_stride_slot,
    proposal_stride_place,
    mask_token,
    vocabulary,
    MOST: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    SAMPLED: tl.constexpr,  # noqa: N803
):
    row, block = tl.program_id(0), tl.program_id(1)
    request, place = row // MOST, row % MOST
    if place >= tl.load(counts + request):
        return
    slot = tl.load(slots + request).to(tl.int64)
    column = block * BLOCK + tl.arange(0, BLOCK)
    mask = column < vocabulary
    at = tl.load(first_row + request).to(tl.int64) + place
    x = tl.load(logits + at * logits_stride + column, mask=mask & (column != mask_token), other=float("-inf"))
    score = tl.where(x == x, x, float("-inf")).to(tl.float32)
    if SAMPLED:
        temperature = tl.load(temperatures + slot)
        if temperature != 0.0:
            kept = proposal + slot * proposal_stride_slot + place * proposal_stride_place + column
            tl.store(kept, x.to(proposal.dtype.element_ty), mask=mask)
            # The draft must come from the very q that is kept, so from its logits as they are rounded there.
            score = tl.where(x == x, x, float("-inf")).to(proposal.dtype.element_ty).to(tl.float32)
            position = tl.load(positions + request) + place
            score = score / temperature - noise.log_exponential(tl.load(seeds + slot), column, position, _DRAFT)
            score = tl.where(mask, score, float("-inf"))
    store_best(values, indices, row, blocks, block, score, BLOCK)


@triton.jit
def _pick(
    drafts,
    values,
    indices,
    blocks,
    counts,
    mask_token,
    MOST: tl.constexpr,  # noqa: N803
    BLOCKS: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0)
    token = mask_token
    if row % MOST < tl.load(counts + row // MOST):
        _, token = best(values, indices, row, blocks, BLOCKS)
    tl.store(drafts + row, token)


def draft_rows(rows: MaskRows, drafts: Tensor, proposal: Tensor | None) -> None:
    """As `rows.draft_rows`, without a wait for the device. `drafts` must be contiguous."""
    batch, most = drafts.shape
    vocabulary = rows.logits.shape[-1]
    blocks = triton.cdiv(vocabulary, BLOCK)
    if batch == 0:
        return
    values = torch.empty(batch * most, blocks, dtype=torch.float32, device=drafts.device)
    indices = torch.empty(batch * most, blocks, dtype=torch.int32, device=drafts.device)
    kept = rows.logits if proposal is None else proposal
    strides = (0, 0) if proposal is None else (proposal.stride(0), proposal.stride(1))
    _race[(batch * most, blocks)](
        values, indices, blocks, rows.logits, rows.logits.stride(0), rows.first_row, rows.count, rows.position,
        rows.slot, rows.temperature, rows.seed, kept, *strides, rows.mask_token_id, vocabulary,
        MOST=most, BLOCK=BLOCK, SAMPLED=proposal is not None,
    )  # fmt: skip
    _pick[(batch * most,)](
        drafts, values, indices, blocks, rows.count, rows.mask_token_id,
        MOST=most, BLOCKS=triton.next_power_of_2(blocks), num_warps=1,
    )  # fmt: skip
