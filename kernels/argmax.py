"""The argmax of a row by blocks, for Triton kernels: each program stores its block's best, a later one picks the best.

The lowest index wins a tie, as with torch's argmax.
"""

from vllm.triton_utils import tl, triton


@triton.jit
def store_best(values, indices, row, blocks, block, score, BLOCK: tl.constexpr):  # noqa: N803
    """Store the maximum of `score`, block number `block` of BLOCK columns, and its column; returns the maximum."""
    value, first = tl.max(score, axis=0, return_indices=True)
    at = row.to(tl.int64) * blocks + block
    tl.store(values + at, value)
    tl.store(indices + at, block * BLOCK + first)
    return value


@triton.jit
def best(values, indices, row, blocks, BLOCKS: tl.constexpr):  # noqa: N803
    """The maximum of a row and its column, from its blocks. BLOCKS: `blocks` rounded up to a power of two."""
    block = tl.arange(0, BLOCKS)
    at = row.to(tl.int64) * blocks
    part = tl.load(values + at + block, mask=block < blocks, other=float("-inf"))
    value, first = tl.max(part, axis=0, return_indices=True)
    return value, tl.load(indices + at + first)
