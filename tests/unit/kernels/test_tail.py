"""Attention of extra mask rows: the compiled form against plain torch, over shapes, dtypes and where blocks end."""

from __future__ import annotations

import pytest
import torch
from vllm_idlm.kernels import tail
from vllm_idlm.kernels.tail import Tail, naive


def make(
    contexts: list[int], k: int, n: int, *, heads=4, key_heads=2, size=64, block=32, dtype=torch.float32, seed=0
) -> tuple:
    """Queries, a paged cache laid out as vLLM's CPU backend does, extra rows of a batch: every group but k's."""
    draw = torch.Generator().manual_seed(seed)
    width = (1 + k) + (k + 1) * (n - 1)
    blocks = max(-(-(context + width) // block) for context in contexts)
    table = (torch.randperm(len(contexts) * blocks, generator=draw) + 1).int().reshape(len(contexts), blocks)
    cache = torch.randn(len(contexts) * blocks + 1, key_heads, 2, block * size, generator=draw).to(dtype)
    key = cache[:, :, 0].unflatten(2, (size, block)).transpose(2, 3)
    value = cache[:, :, 1].unflatten(2, (block, size))
    rows, starts = [], [0]
    for request, context in enumerate(contexts):
        place = 1 + k + n - 1  # behind the causal row
        for j in range(k):
            first = context + place
            rows += [(request * width + place + i, context + 1 + j, first, first + i + 1) for i in range(n - 1)]
            place += n - 1
        starts.append(len(rows))
    query = torch.randn(len(contexts) * width, heads + 3, size, generator=draw).to(dtype)[:, :heads]  # as cut from qkv
    fields = torch.tensor(rows, dtype=torch.int32).reshape(-1, 4).T.contiguous()
    return query, key, value, Tail(table, torch.tensor(starts, dtype=torch.int32), fields, k * (n - 1))


def both(query, key, value, rows) -> tuple[torch.Tensor, torch.Tensor]:
    found, wanted = torch.full_like(query, 7.0), torch.full_like(query, 7.0)
    tail.tail_attention(found, query, key, value, rows, query.shape[-1] ** -0.5)
    naive.tail_attention(wanted, query.float(), key.float(), value.float(), rows, query.shape[-1] ** -0.5)
    return found.float(), wanted.float()


def close(found, wanted, dtype) -> None:
    bound = {"atol": 2e-6, "rtol": 2e-5} if dtype is torch.float32 else {"atol": 2e-2, "rtol": 1e-2}
    torch.testing.assert_close(found, wanted, **bound)


def test_the_compiled_form_is_what_is_tested():
    assert tail.load() == "compiled"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(2, 1), (3, 1), (3, 2), (4, 3), (4, 1), (6, 5), (8, 7), (8, 3)])
def test_strides_and_drafts(n, k, dtype):
    close(*both(*make([0, 1, 30, 31, 32, 200], k, n, dtype=dtype)), dtype)


@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (9, 3), (8, 8), (32, 4), (7, 1)])
@pytest.mark.parametrize("size", [32, 48, 64, 80, 128, 256])
def test_heads(heads, key_heads, size):
    close(*both(*make([77, 130], 2, 4, heads=heads, key_heads=key_heads, size=size)), torch.float32)


@pytest.mark.parametrize("block", [32, 64, 128, 256])
@pytest.mark.parametrize("context", [0, 27, 28, 100, 127, 128, 129, 1000])
def test_blocks_and_contexts(block, context):
    close(*both(*make([context], 3, 4, block=block, dtype=torch.bfloat16)), torch.bfloat16)


def test_a_long_context():
    close(*both(*make([32_700, 5], 3, 4, heads=2, key_heads=1)), torch.float32)


def test_large_scores():
    """A softmax that is all but one-hot, at scores far beyond what exp holds (and rounded at 1e-5 themselves)."""
    query, key, value, rows = make([150, 300], 3, 4)
    torch.testing.assert_close(*both(query * 100, key, value, rows), atol=1e-4, rtol=1e-3)


def test_other_rows_are_left_alone_and_rubbish_in_the_cache_is_not_read():
    query, key, value, rows = make([40, 3], 3, 4)
    used = torch.zeros(key.shape[0], key.shape[2], dtype=torch.bool)
    for request, table in enumerate(rows.block_table):
        first, last = rows.starts[request : request + 2]
        end = int(rows.rows[3, first:last].max())
        used[table[torch.arange(end) // 32].long(), torch.arange(end) % 32] = True
    hole = ~used[:, None, :, None].expand_as(key)
    key[hole] = float("nan")
    value[hole] = float("nan")
    found, wanted = both(query, key, value, rows)
    close(found, wanted, torch.float32)
    untouched = torch.ones(len(query), dtype=torch.bool)
    untouched[rows.rows[0].long()] = False
    assert (found[untouched] == 7.0).all()
    assert untouched.any()


def test_a_row_does_not_depend_on_its_company():
    query, key, value, rows = make([300, 40, 170], 3, 4, dtype=torch.bfloat16)
    together, _ = both(query, key, value, rows)
    first, last = rows.starts[1:3]
    alone = Tail(rows.block_table[1:2], torch.tensor([0, last - first], dtype=torch.int32),
                 rows.rows[:, first:last].contiguous(), rows.most)  # fmt: skip
    found, _ = both(query, key, value, alone)
    own = alone.rows[0].long()
    assert torch.equal(found[own], together[own])


def test_rows_that_are_not_there_are_skipped():
    query, key, value, rows = make([300, 40, 170], 3, 4)
    gone = torch.zeros(rows.rows.shape[1], dtype=torch.bool)
    gone[5:9] = gone[9:18] = True  # the last rows of one request, all of another
    fields = torch.where(gone, torch.tensor([[-1], [0], [0], [0]], dtype=torch.int32), rows.rows)
    found, wanted = both(query, key, value, rows._replace(rows=fields))
    close(found, wanted, torch.float32)
    assert (found[rows.rows[0, gone].long()] == 7.0).all()
    assert (found[rows.rows[0, ~gone].long()] != 7.0).all()


def test_the_mathematics_is_a_masked_softmax():
    """The oracle itself against torch's own attention with the mask written out."""
    query, key, value, rows = make([20], 2, 3)
    _, wanted = both(query, key, value, rows)
    place, table = torch.arange(29), rows.block_table[0].long()
    keys, values = (c[table[place // 32], :, place % 32].transpose(0, 1).repeat_interleave(2, 0) for c in (key, value))
    for row, visible, first, end in rows.rows.T.tolist():
        mask = (place < visible) | ((place >= first) & (place < end))
        made = torch.nn.functional.scaled_dot_product_attention(query[row].unsqueeze(1), keys, values, attn_mask=mask)
        torch.testing.assert_close(wanted[row], made[:, 0], atol=1e-5, rtol=1e-5)


def test_shapes_it_was_not_made_for_are_refused():
    query, key, value, rows = make([20], 2, 3)
    with pytest.raises(RuntimeError, match="blocks in multiples of 32"):
        tail.tail_attention(query, query, key[:, :, :16], value[:, :, :16], rows, 1.0)
