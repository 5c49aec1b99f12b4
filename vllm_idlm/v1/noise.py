"""Random numbers for verification and drafting: a request with a seed draws from its own generator only.

Draft, accept and resample noise are successive draws of one stream, hence independent of each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def uniform(counts: Sequence[int], generators: Sequence[torch.Generator | None], device: torch.device) -> torch.Tensor:
    """[sum(counts)] float64 in [0, 1): counts[i] numbers of request i, from its generator if it has one."""
    noise = torch.rand(sum(counts), dtype=torch.float64, device=device)
    start = 0
    for count, generator in zip(counts, generators, strict=True):
        if count and generator is not None:
            noise[start : start + count].uniform_(generator=generator)
        start += count
    return noise
