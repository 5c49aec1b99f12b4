"""Attention of extra mask rows: `tail_attention`, compiled for the CPU, Triton on a GPU, else in plain torch."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import torch
from torch import Tensor
from vllm_idlm.kernels import native
from vllm_idlm.kernels.tail.naive import Tail
from vllm_idlm.kernels.tail.naive import tail_attention as in_torch

__all__ = ["Tail", "load", "tail_attention"]

log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("tail.cpp")


@functools.cache
def load() -> str:
    """Make the CPU's form ready; returns which one it is, "compiled" or "naive"."""
    try:
        native.load(SOURCE, "tail_attention_")
        return "compiled"
    except native.BuildError as error:
        log.warning("attention of extra mask rows runs in plain torch, many times slower: %s", error)
        return "naive"


def tail_attention(output: Tensor, query: Tensor, key: Tensor, value: Tensor, tail: Tail, scale: float) -> None:
    """`naive.tail_attention`, which gives the mathematics and the shapes, in the fastest form for these tensors."""
    if not query.is_cpu:
        from vllm_idlm.kernels.tail.triton import tail_attention as by_triton

        by_triton(output, query, key, value, tail, scale)
    elif query.dtype in (torch.float32, torch.bfloat16) and load() == "compiled":
        torch.ops.vllm_idlm.tail_attention_(output, query, key, value, *tail[:3], scale)
    else:
        in_torch(output, query, key, value, tail, scale)
