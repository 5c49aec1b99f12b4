"""Philox 4x32-10 (Salmon et al., 2011) and what is drawn from it, in plain torch: the oracle of `triton.py`."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57


def philox(seed: Tensor, index: Tensor, position: Tensor, stream: int) -> Tensor:
    """The first 32 random bits of counter (index, position, stream, 0) under key `seed`, as int64; shapes broadcast."""
    seed, index, position = torch.broadcast_tensors(seed.long(), index.long(), position.long())
    a, b = seed & _LOW, (seed >> 32) & _LOW
    c0, c1 = index & _LOW, position & _LOW
    c2, c3 = torch.full_like(c0, stream), torch.zeros_like(c0)
    for _ in range(10):
        low_a, high_a = _multiply(_ROUND_A, c0)
        low_b, high_b = _multiply(_ROUND_B, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ a, low_b, high_a ^ c3 ^ b, low_a
        a, b = (a + _KEY_A) & _LOW, (b + _KEY_B) & _LOW
    return c0


def _multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Low and high 32 bits of a 32 x 32 bit product, within int64."""
    low = constant * (x & 0xFFFF)
    high = constant * (x >> 16) + (low >> 16)
    return ((high & 0xFFFF) << 16) | (low & 0xFFFF), high >> 16


def uniform(seed: Tensor, index: Tensor, position: Tensor, stream: int) -> Tensor:
    """Float32 in [0, 1), 24 bits."""
    return (philox(seed, index, position, stream) >> 8).float() * 2.0**-24


def exponential(seed: Tensor, index: Tensor, position: Tensor, stream: int) -> Tensor:
    """Float32 > 0, exponential with mean 1.

    An index wins the race with probability proportional to its weight if its exponential over its weight is smallest
    (the Gumbel-max trick by another name). Small values decide, so they are made from small uniforms, which keep all of
    the 32 bits, where 1 - u would have 24.
    """
    u = (philox(seed, index, position, stream).float() + 0.5) * 2.0**-32
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5 + u / 6)))))
    return torch.where(u < 0.03125, series, -torch.log(1 - u.clamp(max=0.99999994)))
