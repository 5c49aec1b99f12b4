"""Attention of extra mask rows in Triton, for GPUs: `naive.tail_attention`, by stretches of the keys that are joined.

A program is one request, one key head and one of SPLITS stretches: all rows and query heads of it against those keys,
so a key is read once for all groups. The number of stretches follows from that of requests and heads alone, so that a
launch does not depend on lengths and can be part of a CUDA graph; a short sequence leaves some of them empty.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.triton_utils import tl, triton
from vllm_idlm.kernels.noise import triton as noise
from vllm_idlm.kernels.tail.naive import Tail

SPLITS = 8  # at most
PROGRAMS = 256  # about two for each multiprocessor of a large GPU; more of them would only take memory
TILE = 64  # keys of a step
WARPS = 8  # with fewer, registers would spill


@triton.jit
def _stretch(
    part_max,
    part_sum,
    part_out,
    query,
    query_stride,
    key,
    key_block,
    key_head,
    key_token,
    key_size,
    value,
    value_block,
    value_head,
    value_token,
    value_size,
    table,
    table_stride,
    starts,
    rows,
    total,
    scale,
    GROUP: tl.constexpr,  # noqa: N803
    SIZE: tl.constexpr,  # noqa: N803
    PADDED: tl.constexpr,  # noqa: N803
    TOKENS: tl.constexpr,  # noqa: N803
    M: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    SPLITS: tl.constexpr,  # noqa: N803
    WIDE: tl.constexpr,  # noqa: N803
):
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(starts + request)
    score = tl.arange(0, M)  # a row and one of its query heads
    live = score // GROUP < tl.load(starts + request + 1) - first
    at = rows + first + score // GROUP
    row = tl.load(at, mask=live, other=-1)
    if tl.max(row, axis=0) < 0:  # no rows (room of a CUDA graph): `_join` reads nothing of it
        return
    live = live & (row >= 0)
    visible = tl.load(at + total, mask=live, other=0)
    own_first = tl.load(at + 2 * total, mask=live, other=0)
    own_end = tl.load(at + 3 * total, mask=live, other=0)
    end = tl.maximum(tl.max(visible, axis=0), tl.max(own_end, axis=0))
    length = (((end + SPLITS - 1) // SPLITS + TILE - 1) // TILE) * TILE
    begin = split * length
    end = tl.minimum(end, begin + length)

    size = tl.arange(0, PADDED)
    own = (head * GROUP + score % GROUP) * SIZE
    from_query = query + row.to(tl.int64)[:, None] * query_stride + own[:, None] + size[None, :]
    q = tl.load(from_query, mask=live[:, None] & (size < SIZE)[None, :], other=0.0)
    if WIDE:  # the interpreter's products of bfloat16 are wrong
        q = q.to(tl.float32)
    maximum = tl.full((M,), float("-inf"), tl.float32)
    weight = tl.zeros((M,), tl.float32)
    out = tl.zeros((M, PADDED), tl.float32)
    for tile in range(begin, end, TILE):
        token = tile + tl.arange(0, TILE)
        real = token < end
        block = tl.load(table + request * table_stride + token // TOKENS, mask=real, other=0).to(tl.int64)
        inside = real[:, None] & (size < SIZE)[None, :]
        from_key = key + block * key_block + head * key_head + token % TOKENS * key_token
        k = tl.load(from_key[:, None] + size[None, :] * key_size, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k).to(q.dtype), input_precision="ieee") * scale
        sees = token[None, :] < visible[:, None]
        sees = sees | ((token[None, :] >= own_first[:, None]) & (token[None, :] < own_end[:, None]))
        scores = tl.where(sees, scores, float("-inf"))
        new = tl.maximum(maximum, tl.max(scores, axis=1))
        base = tl.where(new == float("-inf"), 0.0, new)
        kept = tl.exp(maximum - base)
        share = tl.exp(scores - base[:, None])
        from_value = value + block * value_block + head * value_head + token % TOKENS * value_token
        v = tl.load(from_value[:, None] + size[None, :] * value_size, mask=inside, other=0.0)
        out = out * kept[:, None] + tl.dot(share.to(q.dtype), v.to(q.dtype), input_precision="ieee")
        weight = weight * kept + tl.sum(share, axis=1)
        maximum = new
    part = ((request * tl.num_programs(1) + head) * SPLITS + split) * M + score
    tl.store(part_max + part, maximum)
    tl.store(part_sum + part, weight)
    tl.store(part_out + part[:, None] * PADDED + size[None, :], out)


@triton.jit
def _join(
    output,
    output_stride,
    part_max,
    part_sum,
    part_out,
    starts,
    rows,
    GROUP: tl.constexpr,  # noqa: N803
    SIZE: tl.constexpr,  # noqa: N803
    PADDED: tl.constexpr,  # noqa: N803
    M: tl.constexpr,  # noqa: N803
    SPLITS: tl.constexpr,  # noqa: N803
):
    request, head, score = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(starts + request)
    live = score // GROUP < tl.load(starts + request + 1) - first
    row = tl.load(rows + first + score // GROUP, mask=live, other=-1)
    if row >= 0:
        split = tl.arange(0, SPLITS)
        part = ((request * tl.num_programs(1) + head) * SPLITS + split) * M + score
        maximum = tl.load(part_max + part)
        share = tl.exp(maximum - tl.max(maximum, axis=0))
        weight = tl.sum(share * tl.load(part_sum + part), axis=0)
        size = tl.arange(0, PADDED)
        parts = tl.load(part_out + part[:, None] * PADDED + size[None, :])
        made = tl.sum(parts * share[:, None], axis=0) / weight
        to = output + row.to(tl.int64) * output_stride + (head * GROUP + score % GROUP) * SIZE + size
        tl.store(to, made.to(output.dtype.element_ty), mask=size < SIZE)


def splits(requests: int, heads: int) -> int:
    """Stretches of the keys, a power of 2: as many as keep the device busy."""
    return max(1, min(SPLITS, triton.next_power_of_2(PROGRAMS // max(1, requests * heads))))


def tail_attention(output: Tensor, query: Tensor, key: Tensor, value: Tensor, tail: Tail, scale: float) -> None:
    """As `naive.tail_attention`, without a wait for the device. Rows of query and output must be in one piece."""
    requests, heads, size = len(tail.block_table), key.shape[1], query.shape[2]
    group = query.shape[1] // heads
    if query.stride(1) != size or query.stride(2) != 1 or output.stride(1) != size or output.stride(2) != 1:
        raise ValueError(f"rows of query and output must be in one piece; got strides {query.stride()}")
    padded, scores = triton.next_power_of_2(size), max(16, triton.next_power_of_2(tail.most * group))
    stretches = splits(requests, heads)
    parts = (requests, heads, stretches, scores)
    maximum, weight = torch.empty(2, *parts, dtype=torch.float32, device=query.device)
    out = torch.empty(*parts, padded, dtype=torch.float32, device=query.device)
    shape = {"GROUP": group, "SIZE": size, "PADDED": padded, "M": scores, "SPLITS": stretches}
    _stretch[(requests, heads, stretches)](
        maximum, weight, out, query, query.stride(0), key, *key.stride(), value, *value.stride(), tail.block_table,
        tail.block_table.stride(0), tail.starts, tail.rows, tail.rows.shape[1], scale,
        TOKENS=key.shape[2], TILE=TILE, WIDE=noise.INTERPRETED, num_warps=WARPS, **shape,
    )  # fmt: skip
    _join[(requests, heads, tail.most * group)](
        output, output.stride(0), maximum, weight, out, tail.starts, tail.rows, **shape
    )
