"""Products of a few rows with a weight on CPUs: `linear`, one op that torch.compile takes as it is."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor
from vllm_idlm.kernels import native

__all__ = ["DTYPES", "fits", "linear", "load"]
SOURCE = Path(__file__).with_name("linear.cpp")
DTYPES = (torch.bfloat16, torch.float32)


@functools.cache
def load() -> None:
    """Make `torch.ops.vllm_idlm.linear` exist; `native.BuildError` where it cannot be built."""
    native.load(SOURCE)
    torch.library.register_fake("vllm_idlm::linear", _shape)


def _shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def fits(weight: Tensor) -> bool:
    """Whether `linear` takes this weight."""
    whole = weight.is_cpu and weight.ndim == 2 and weight.is_contiguous() and weight.dtype in DTYPES
    return whole and weight.numel() > 0 and weight.shape[1] * weight.element_size() % 64 == 0


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`naive.linear`, which gives the mathematics and the shapes; `load` comes first.

    A row's result does not depend on the other rows. Sums are float32.
    """
    return torch.ops.vllm_idlm.linear(x, weight, bias)
