"""The Triton kernel of extra mask rows against plain torch, under the interpreter."""

from __future__ import annotations

import pytest
import torch
from vllm_idlm.kernels.tail import naive
from vllm_idlm.kernels.tail import triton as kernel
from vllm_idlm.kernels.tail.triton import tail_attention

from tests.unit.kernels.test_tail import close, make


def both(query, key, value, rows):
    found, wanted = torch.full_like(query, 7.0).contiguous(), torch.full_like(query, 7.0).float().contiguous()
    tail_attention(found, query, key, value, rows, query.shape[-1] ** -0.5)
    naive.tail_attention(wanted, query.float(), key.float(), value.float(), rows, query.shape[-1] ** -0.5)
    return found.float(), wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(2, 1), (4, 3), (4, 1), (8, 7)])
def test_strides_and_drafts(n, k, dtype):
    close(*both(*make([0, 63, 200], k, n, dtype=dtype)), dtype)


@pytest.mark.parametrize("stretches", [1, 2, 4])
def test_however_many_stretches_of_keys(stretches, monkeypatch):
    """A large batch keeps a device busy with few of them, or one."""
    query, key, *rest = make([0, 63, 500], 3, 4)
    monkeypatch.setattr(kernel, "PROGRAMS", stretches * 3 * key.shape[1])
    assert kernel.splits(3, key.shape[1]) == stretches
    close(*both(query, key, *rest), torch.float32)


def test_requests_without_rows_are_left_alone():
    """Room of a CUDA graph: its rows are -1."""
    query, key, value, rows = make([0, 63, 500], 3, 4)
    first, last = rows.starts[1:3].tolist()
    rows.rows[:, first:last] = torch.tensor([-1, 0, 0, 0], dtype=torch.int32)[:, None]
    found, wanted = both(query, key, value, rows)
    close(found, wanted, torch.float32)
    assert (found == 7.0).all(-1).all(-1).sum() > 0


@pytest.mark.parametrize(("heads", "key_heads", "size"), [(9, 3, 64), (8, 8, 32), (32, 4, 128), (5, 1, 80)])
def test_heads(heads, key_heads, size):
    close(*both(*make([77], 2, 4, heads=heads, key_heads=key_heads, size=size)), torch.float32)


@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("context", [0, 27, 511, 512, 1000])
def test_blocks_and_contexts(block, context):
    close(*both(*make([context], 3, 4, block=block)), torch.float32)


def test_a_cache_with_keys_and_values_side_by_side():
    """As on a GPU: [blocks, heads, tokens, 2 size], or with heads inside tokens."""
    query, key, value, rows = make([130, 20], 3, 4)
    for order in ((0, 1, 2), (0, 2, 1)):
        cache = torch.cat([key, value], -1).permute(*order, 3).contiguous().permute(*order, 3)
        close(*both(query, *cache.split(key.shape[-1], -1), rows), torch.float32)


def test_rows_that_are_not_there_are_skipped_and_others_left_alone():
    query, key, value, rows = make([300, 40], 3, 4)
    fields = rows.rows.clone()
    fields[:, 5:] = torch.tensor([[-1], [0], [0], [0]])
    found, wanted = both(query, key, value, rows._replace(rows=fields))
    close(found, wanted, torch.float32)
    assert (found == 7.0).all(-1).all(-1).sum() == len(query) - 5


def test_rubbish_behind_the_sequence_is_not_read():
    query, key, value, rows = make([40], 3, 4)
    end = int(rows.rows[3].max())
    last = rows.block_table[0, end // 32]
    key[last, :, end % 32 :] = float("nan")
    value[last, :, end % 32 :] = float("nan")
    close(*both(query, key, value, rows), torch.float32)
