"""Random numbers for verification and drafting: a request with a seed draws from its own generator only.

Draft, accept and resample noise are successive draws of one stream, hence independent of each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


def uniform(counts: Sequence[int], generators: Mapping[int, torch.Generator], device: torch.device) -> torch.Tensor:
    """[sum(counts)] float64 in [0, 1): counts[i] numbers of request i."""
    noise = torch.rand(sum(counts), dtype=torch.float64, device=device)
    start = 0
    for i, count in enumerate(counts):
        if count and (generator := generators.get(i)) is not None:
            noise[start : start + count].uniform_(generator=generator)
        start += count
    return noise


def exponential_rows(
    like: torch.Tensor,  # [rows, vocab]
    requests: Sequence[int],
    counts: Sequence[int],  # rows of each of `requests`, sum = rows
    generators: Mapping[int, torch.Generator],
) -> torch.Tensor:
    """[rows, vocab] float32 Exp(1) noise for an exponential race; a seeded request's rows come from its generator."""
    noise = torch.empty_like(like, dtype=torch.float32)
    if not all(request in generators for request in requests):
        noise.exponential_()
    start = 0
    for request, count in zip(requests, counts, strict=True):
        if (generator := generators.get(request)) is not None:
            noise[start : start + count].exponential_(generator=generator)
        start += count
    return noise
