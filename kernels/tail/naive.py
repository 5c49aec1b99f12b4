"""Attention of extra mask rows in plain torch: the oracle of the compiled forms, meant to be obviously right.

A verify forward may carry, behind the causal row `[x, d1..dk, M..]`, further groups of mask slots, one for each number
of drafts that may be accepted (`proposers.state`). A mask of the group for `j` accepted drafts sees the sequence up to
`dj` and the masks of its own group up to itself; nothing between. Its keys and values are in the paged cache like
everybody's, only what it sees is not one stretch but two:

    places 0 .. visible - 1            the sequence up to and with dj
    places own_first .. own_end - 1    its own group, up to itself

Rows of the causal row are never touched here: they are the platform's own attention, as without extra groups, so what
is verified does not depend on this file.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tail(NamedTuple):
    """E extra rows of R requests, the rows of a request side by side.

    A row that is not there has -1 for its query and 0 for the rest: on a GPU the host does not know which are.
    """

    block_table: Tensor  # [R, blocks] int32, of the requests that have such rows
    starts: Tensor  # [R + 1] int32, where each request's rows begin in `rows`
    rows: Tensor  # [4, E] int32: row of the query, visible, own_first, own_end
    most: int  # rows of a request at most


def tail_attention(output: Tensor, query: Tensor, key: Tensor, value: Tensor, tail: Tail, scale: float) -> None:
    """Write the attention of the rows of `tail` into `output`; other rows of it are left as they are.

    output, query: [T, heads, size]; key, value: [blocks, key heads, tokens of a block, size], any strides;
    scale: of the scores. Sums are float32.
    """
    group = query.shape[1] // key.shape[1]
    for request, table in enumerate(tail.block_table):
        first, last = tail.starts[request], tail.starts[request + 1]
        for row, visible, own_first, own_end in tail.rows[:, first:last].T.tolist():
            if row < 0:
                continue
            seen = torch.tensor([*range(visible), *range(max(own_first, visible), own_end)], device=query.device)
            block, token = table[seen // key.shape[2]].long(), seen % key.shape[2]
            keys, values = (
                cache[block, :, token].float().repeat_interleave(group, 1) for cache in (key, value)
            )  # [seen, heads, size]
            weights = (torch.einsum("hd,shd->hs", query[row].float(), keys) * scale).softmax(-1)
            output[row] = torch.einsum("hs,shd->hd", weights, values).to(output.dtype)
