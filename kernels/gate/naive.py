"""What each row of a forward is, and which adapter it takes: the plain torch form, oracle of `triton.py`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """A batch of B requests as Model Runner V2 lays it out; the last rows of a request are those with logits."""

    query_start: Tensor  # [B + 1] int, first token row of each request
    logits_start: Tensor  # [B + 1] int, first row of each request among those with logits
    seq_len: Tensor  # [B] int, tokens of the request with this forward's rows
    prefill_len: Tensor  # [R] int, by request slot: tokens that the forward does not sample
    slot: Tensor  # [B] int64
    drafts: Tensor  # [R] int32, by request slot: drafts that the last forward proposed


class Gate(NamedTuple):
    """Where the rows of a forward are what they are."""

    drafts: Tensor  # [B] int32, drafts to verify
    masks: Tensor  # [B] int32, mask slots behind them
    token_adapter: Tensor  # [>= tokens] adapter slot of each token row; -1: none
    logits_adapter: Tensor  # [>= rows] the same for rows with logits


def gate(batch: Batch, own: Tensor, draft_adapter: int, out: Gate) -> None:
    """Fill `out` for a forward. Entries beyond the batch's rows are left alone.

    own: [B] int, the adapter slot of each request, -1 for none; draft_adapter: the adapter slot of mask rows.

    In a decode row `[x, d1..dk, M1..Mm]` k is what the request's last forward proposed, or less where the row was cut.
    Where x is the last token of the prompt there are masks alone. A row that starts before it has neither, whatever
    stands behind it.
    """
    rows = (batch.logits_start[1:] - batch.logits_start[:-1]).long()
    generated = batch.seq_len[: len(rows)].long() - rows - batch.prefill_len[batch.slot].long()  # tokens before x
    slots = torch.where(generated >= -1, rows - 1, 0)
    drafts = torch.where(generated >= 0, torch.minimum(batch.drafts[batch.slot].long(), slots), 0)
    out.drafts.copy_(drafts)
    out.masks.copy_(slots - drafts)
    masks = slots - drafts
    for start, adapter in ((batch.query_start, out.token_adapter), (batch.logits_start, out.logits_adapter)):
        counts = (start[1:] - start[:-1]).long()
        owner = torch.repeat_interleave(torch.arange(len(rows), device=start.device), counts)
        behind = start[1:].long()[owner] - torch.arange(len(owner), device=start.device) - 1  # rows behind this one
        adapter[: len(owner)] = torch.where(behind < masks[owner], draft_adapter, own.long()[owner]).to(adapter.dtype)
