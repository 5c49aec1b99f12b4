"""LoRA on vLLM's CPU build, per row: the wrapper that vLLM's LoRA layers call.

vLLM's own CPU wrapper gathers a copy of the weights for every token, and keeps run lengths in buffers of `max_num_seqs`
entries, which alternating rows overflow; that of vLLM 0.32 adds the last slot's adapter to rows without one, too.
Here a step's state is one slot a row; the kernel reads it and touches the rows that have a slot, and no others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from vllm_idlm.kernels import lora


class RowPunicaWrapper(PunicaWrapperCPU):
    """Differs from its parent in that rows without an adapter keep their bits, and in that no run lengths exist."""

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs):
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self._compiled = lora.load() == "compiled"
        self._layers = torch.zeros(0, 0, dtype=torch.int64)  # [layers, fields], see `for_layer`
        self._entries: list[list[int]] = []
        self._kept: list[tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]] = []
        self._token_lora_indices.fill_(-1)
        self._sampler_indices.fill_(-1)
        self._embeddings_indices.fill_(0)
        self.indices_len[:] = [0] * 4
        self.is_prefill = True
        self._ids: list[int | None] = []
        self._vocab_size = 0
        self._base = False

    @contextlib.contextmanager
    def without_lora(self) -> Iterator[None]:
        """A graph that torch.compile traces in here has no LoRA in it."""
        self._base = True
        try:
            yield
        finally:
            self._base = False

    @property
    def idle(self) -> bool:
        """Whether the layers have nothing to add: not in this step or, being traced, not in this graph."""
        return self._base if torch.compiler.is_compiling() else self.no_lora

    def update_metadata(self, mapping, lora_index_to_id, max_loras, vocab_size, **kwargs) -> None:
        """Take over the adapter ids of a step's token rows and logits rows; 0 is no adapter."""
        self._ids = list(lora_index_to_id)
        self._vocab_size = vocab_size
        self.set_rows(self._slots(mapping.index_mapping), self._slots(mapping.prompt_mapping))

    def set_rows(self, token_slots: np.ndarray, logits_slots: np.ndarray) -> None:
        """Set the step's slots, [tokens] and [logits rows] int64, -1 for none.

        Slots are vLLM's, from `slot_of`; they hold until adapters are loaded or dropped.
        """
        tokens, rows = len(token_slots), len(logits_slots)
        _write(self._token_lora_indices, token_slots, self.indices_len[0], -1)
        _write(self._sampler_indices, logits_slots, self.indices_len[1], -1)
        _write(self._embeddings_indices, token_slots.clip(min=0) * self._vocab_size, self.indices_len[3], 0)
        self.indices_len[:] = [tokens, rows, rows, tokens]
        self.no_lora = tokens == 0 or token_slots.max() < 0

    def slot_of(self, lora_id: int) -> int:
        """The slot that holds the adapter `lora_id`, -1 for id 0; ValueError if it is in none."""
        return self._ids.index(lora_id) if lora_id > 0 else -1

    def _slots(self, ids: Sequence[int]) -> np.ndarray:
        present, place = np.unique(np.asarray(ids, dtype=np.int64), return_inverse=True)
        return np.array([self.slot_of(i) for i in present.tolist()], dtype=np.int64)[place.reshape(-1)]

    def for_layer(self, layer: torch.nn.Module) -> RowPunicaWrapper | LayerPunica:
        """What the LoRA layer is to use as its wrapper: this one, or a view of it that knows the layer's weights.

        The layer's B buffers, still empty, are given the memory order that the kernel reads: their shape stays, and so
        does how vLLM fills them.
        """
        if not self._compiled or not isinstance(layer, BaseLinearLayerWithLoRA | LogitsProcessorWithLoRA):
            return self
        if isinstance(layer, LogitsProcessorWithLoRA):
            layer.lora_b_stacked = _rank_by_rank(layer.lora_b_stacked)
            return self
        if not _fits(layer.lora_a_stacked):
            return self
        layer.lora_b_stacked = tuple(_rank_by_rank(b) for b in layer.lora_b_stacked)
        a, b, widths = list(layer.lora_a_stacked), list(layer.lora_b_stacked), list(layer.output_slices)
        self._entries.append(torch.ops.vllm_idlm.lora_layer(a, b, widths))
        self._layers = lora.cpu.table(self._entries)
        self._kept.append((a, b))
        return LayerPunica(self, len(self._entries) - 1)

    # -- what the layers call

    def add_lora_linear(
        self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, *, buffer=None, **kwargs
    ) -> None:
        """y[:, slice] += (x A^T) B^T on rows with a slot. y [n, out], x [n, in]; vLLM's layers pass scale 1."""
        if self.idle:
            return
        y, x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        self._add(y, x, self._token_lora_indices, lora_a_stacked, _scaled(lora_b_stacked, scale), output_slices)

    def add_lora_logits(self, y, x, lora_a_stacked, lora_b_stacked, scale, *, buffer=None, **kwargs) -> None:
        """As `add_lora_linear` for the logits rows. y [rows, >= vocabulary], x [rows, hidden]."""
        y, x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        b = _scaled((lora_b_stacked,), scale)
        self._add(y, x, self._sampler_indices, (lora_a_stacked,), b, (lora_b_stacked.shape[-2],))

    def add_lora_embedding(self, y, x, lora_b_stacked, add_inputs: bool = True, **kwargs) -> None:
        """y += x B^T on rows with a slot. y [n, hidden], x [n, rank]: the rows of A that the layer has looked up."""
        if self.idle:
            return
        rank = x.shape[-1]
        a = torch.eye(rank, dtype=x.dtype, device=x.device).expand(lora_b_stacked.shape[0], 1, rank, rank).contiguous()
        self._add(y, x, self._token_lora_indices, (a,), (lora_b_stacked,), (lora_b_stacked.shape[-2],))

    def add_shrink(self, y, x, lora_a_stacked, scale: float, **kwargs) -> None:
        """y[s] += (x A_s^T) scale on rows with a slot (adapters sharded over ranks call the two halves apart)."""
        x = x.view(-1, x.shape[-1]).float()
        for part, a in zip(y, lora_a_stacked, strict=True):
            self._add_dense(part, x * scale, a)

    def add_expand(
        self, y, x, lora_b_stacked, output_slices, offset_start: int = 0, add_inputs: bool = True, **kwargs
    ) -> None:
        """y[:, slice] += x[s] B_s^T on rows with a slot."""
        y, start = y.view(-1, y.shape[-1]), offset_start
        for part, b, width in zip(x, lora_b_stacked, output_slices, strict=True):
            self._add_dense(y[:, start : start + b.shape[-2]], part.float(), b)
            start += width

    # -- how

    def _add(self, y, x, slots, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], widths: Sequence[int]) -> None:
        if y.dtype == x.dtype == a[0].dtype and _fits(a):
            torch.ops.vllm_idlm.add_lora_rows_(y, x, slots, list(a), list(b), list(widths))
            return
        start = 0
        for a_s, b_s, width in zip(a, b, widths, strict=True):
            h = torch.zeros(x.shape[0], a_s.shape[-2], dtype=torch.float32, device=x.device)
            self._add_dense(h, x.float(), a_s, slots)
            self._add_dense(y[:, start : start + b_s.shape[-2]], h, b_s, slots)
            start += width

    def _add_dense(self, y, x, weight, slots: torch.Tensor | None = None) -> None:
        """y += x W^T on rows with a slot, for what the kernel does not take: one product over all rows a slot."""
        slots = (self._token_lora_indices if slots is None else slots)[: x.shape[0], None]
        for slot in range(weight.shape[0]):
            update = (y.float() + x @ weight[slot, 0].float().T).to(y.dtype)
            y.copy_(torch.where(slots == slot, update, y))


class LayerPunica:
    """The wrapper as one linear layer sees it: the compiled graph then passes an index instead of all its weights."""

    def __init__(self, rows: RowPunicaWrapper, index: int):
        self._rows = rows
        self._index = index

    def add_lora_linear(self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **kwargs) -> None:
        """`RowPunicaWrapper.add_lora_linear` with the weights that `for_layer` entered (the same as given here)."""
        rows = self._rows
        if rows.idle:
            return
        if scale != 1.0 or x.dtype != lora_a_stacked[0].dtype:
            rows.add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices)
            return
        y, x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        torch.ops.vllm_idlm.add_lora_layer_(y, x, rows._token_lora_indices, rows._layers, self._index)

    def __getattr__(self, name: str):
        return getattr(self._rows, name)


def _rank_by_rank(b: torch.Tensor) -> torch.Tensor:
    """B [slots, 1, out, rank] with each rank's outputs side by side in memory."""
    return b.transpose(-1, -2).contiguous().transpose(-1, -2)


def _fits(weights: Sequence[torch.Tensor]) -> bool:
    """Whether the kernel takes weights of this dtype."""
    return weights[0].dtype in (torch.float32, torch.bfloat16)


def _scaled(weights: Sequence[torch.Tensor], scale: float) -> Sequence[torch.Tensor]:
    return weights if scale == 1.0 else [w * scale for w in weights]


def _write(buffer: torch.Tensor, values: np.ndarray, before: int | None, empty: int) -> None:
    """The first entries of `buffer` become `values`; what the last step wrote beyond them becomes `empty`."""
    count = len(values)
    target = buffer.numpy()
    target[:count] = values
    target[count : max(count, before or 0)] = empty
