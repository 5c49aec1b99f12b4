"""The compiled form of `naive.add_lora_rows` for the CPU: rows.cpp, built once and loaded as the ops of this file.

The op is `torch.ops.vllm_idlm.add_lora_rows_(y, x, slots, lora_a, lora_b, output_slices)`, arguments as in naive.py,
float32 or bfloat16, `slots` a buffer of at least n entries; B is copied unless its memory is [slots, 1, rank, out].
A model enters each layer's weights in a table once, `lora_layer(lora_a, lora_b, output_slices)` gives its row (and
insists on that memory order), and calls `add_lora_layer_(y, x, slots, table, index)`: five arguments instead of up to
18. torch.compile traces both.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from vllm_idlm.kernels import native

SOURCE = Path(__file__).with_name("rows.cpp")


@functools.cache
def load() -> None:
    """Build and load the ops into this process; `native.BuildError` if they cannot be had here."""
    native.load(SOURCE, "add_lora_rows_", "add_lora_layer_")


def table(entries: list[list[int]]) -> torch.Tensor:
    """[layers, fields] int64: the rows from `lora_layer`, padded to one length, for `add_lora_layer_`."""
    width = max(map(len, entries))
    return torch.tensor([entry + [0] * (width - len(entry)) for entry in entries])
