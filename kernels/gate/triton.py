"""`gate` in Triton: one launch, a program a request."""

from __future__ import annotations

from torch import Tensor
from vllm.triton_utils import tl, triton
from vllm_idlm.kernels.gate.naive import Batch, Gate

BLOCK = 1024


@triton.jit
def _fill(out, start, end, masks, own, draft_adapter, BLOCK: tl.constexpr):  # noqa: N803
    for first in range(start, end, BLOCK):
        row = first + tl.arange(0, BLOCK)
        value = tl.where(row >= end - masks, draft_adapter, own)
        tl.store(out + row, value, mask=row < end)


@triton.jit(do_not_specialize=["draft_adapter"])  # its slot in vLLM may be any, and the kernel is compiled once
def _gate(
    out_drafts,
    out_masks,
    token_adapter,
    logits_adapter,
    query_start,
    logits_start,
    seq_len,
    prefill_len,
    slots,
    drafts,
    own,
    draft_adapter,
    BLOCK: tl.constexpr,  # noqa: N803
):
    request = tl.program_id(0)
    slot = tl.load(slots + request).to(tl.int64)
    first, end = tl.load(logits_start + request), tl.load(logits_start + request + 1)
    generated = tl.load(seq_len + request) - (end - first) - tl.load(prefill_len + slot)
    places = tl.where(generated >= -1, end - first - 1, 0)
    count = tl.where(generated >= 0, tl.minimum(tl.load(drafts + slot), places), 0)
    tl.store(out_drafts + request, count)
    tl.store(out_masks + request, places - count)
    adapter = tl.load(own + request)
    _fill(logits_adapter, first, end, places - count, adapter, draft_adapter, BLOCK)
    start, stop = tl.load(query_start + request), tl.load(query_start + request + 1)
    _fill(token_adapter, start, stop, places - count, adapter, draft_adapter, BLOCK)


def gate(batch: Batch, own: Tensor, draft_adapter: int, out: Gate) -> None:
    """As `naive.gate`, without a wait for the device."""
    _gate[(len(batch.slot),)](
        out.drafts, out.masks, out.token_adapter, out.logits_adapter, batch.query_start, batch.logits_start,
        batch.seq_len, batch.prefill_len, batch.slot, batch.drafts, own, draft_adapter, BLOCK=BLOCK,
    )  # fmt: skip
