"""As `naive.py`, inside a Triton kernel."""

import os

from vllm.triton_utils import tl, triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # there a program is slow and its size costs little


@triton.jit
def bits(seed, index, position, stream: tl.constexpr):
    """32 random bits of counter (index, position, stream, 0) under key `seed` (int64). index: int32 block."""
    position = index * 0 + position.to(tl.int32)
    c2 = index * 0 + stream
    c0, _, _, _ = tl.philox(seed, index, position, c2, index * 0)
    return c0


@triton.jit
def uniform(seed, position, stream: tl.constexpr):
    """One float32 in [0, 1)."""
    index = tl.zeros((1,), tl.int32)
    return tl.sum((bits(seed, index, position, stream) >> 8).to(tl.float32) * 5.9604644775390625e-08, axis=0)


@triton.jit
def log_exponential(seed, index, position, stream: tl.constexpr):
    """Logarithms of a block of exponentials with mean 1."""
    u = (bits(seed, index, position, stream).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5 + u / 6)))))
    return tl.log(tl.where(u < 0.03125, series, -tl.log(1 - tl.minimum(u, 0.99999994))))
