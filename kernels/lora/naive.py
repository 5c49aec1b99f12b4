"""The oracle of every row-selecting LoRA: the low-rank update of the rows that have an adapter, and of no other.

For a row t with slot k = slots[t] >= 0 and every slice s of the output (q, k, v of one packed projection, say):

    y[t, o_s : o_s + n_s] += B_s[k] (A_s[k] x[t])        o_s = n_0 + .. + n_(s-1)

(Hu et al., LoRA, arXiv 2106.09685; the adapter's scaling is already in B, as vLLM stores it.) Products and sums are
float32 and the new y is rounded to y's dtype once. A row with slot -1 keeps its bits: a gated adapter (R-ISD) must not
touch a clean row, or the text would no longer be the base model's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def add_lora_rows(
    y: torch.Tensor,  # [n, out]                    changed in place
    x: torch.Tensor,  # [n, in]
    slots: torch.Tensor,  # [>= n] int64            adapter slot of each row, -1 for none; the first n count
    lora_a: Sequence[torch.Tensor],  # per slice [slots, 1, rank, in]
    lora_b: Sequence[torch.Tensor],  # per slice [slots, 1, <= n_s, rank]
    output_slices: Sequence[int],  # n_s, the width of each slice of y
) -> None:
    """Add to the rows of `y` with a slot the low-rank update of their own slot; any floating dtypes."""
    slots = slots[: x.shape[0]]
    for slot in slots.unique().tolist():
        if slot < 0:
            continue
        rows = (slots == slot).nonzero()[:, 0]
        start = 0
        for a, b, width in zip(lora_a, lora_b, output_slices, strict=True):
            delta = (x[rows].float() @ a[slot, 0].float().T) @ b[slot, 0].float().T
            columns = slice(start, start + delta.shape[1])
            y[rows, columns] = (y[rows, columns].float() + delta).to(y.dtype)
            start += width
