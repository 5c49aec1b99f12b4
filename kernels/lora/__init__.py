"""Low-rank updates of selected rows: `add_lora_rows`, compiled if a compiler is at hand, else in plain torch."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch
from vllm_idlm.kernels import native

from . import cpu, naive

log = logging.getLogger(__name__)


@functools.cache
def load() -> str:
    """Make `torch.ops.vllm_idlm.add_lora_rows_` exist; returns which form it is, "compiled" or "naive"."""
    try:
        cpu.load()
        return "compiled"
    except native.BuildError as error:
        log.warning("LoRA of selected rows runs in plain torch, several times slower: %s", error)
    torch.library.custom_op("vllm_idlm::add_lora_rows_", _naive, mutates_args=("y",), device_types="cpu")
    return "naive"


def _naive(
    y: torch.Tensor,
    x: torch.Tensor,
    slots: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    output_slices: Sequence[int],
) -> None:
    naive.add_lora_rows(y, x, slots, lora_a, lora_b, output_slices)


def add_lora_rows(
    y: torch.Tensor,
    x: torch.Tensor,
    slots: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    output_slices: Sequence[int],
) -> None:
    """`naive.add_lora_rows` (which gives the mathematics and the shapes) as one op that torch.compile can trace."""
    load()
    torch.ops.vllm_idlm.add_lora_rows_(y, x, slots, lora_a, lora_b, output_slices)
