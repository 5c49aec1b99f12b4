"""The gated adapter in Model Runner V2: which rows are masks is known to the device, so the mapping is made there."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.lora.model_manager import DEFAULT_LANGUAGE_WRAPPER_KEY
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.lora_utils import LoraState


class GatedLoraState(LoraState):
    """Differs from its parent in that the draft adapter is active in every step, for graph dispatch too."""

    def __init__(self, found: LoraState, draft_lora: Any) -> None:
        self.__dict__.update(vars(found))
        self.draft_lora = draft_lora

    def make_lora_inputs(self, req_ids: list[str], idx_mapping: np.ndarray, num_scheduled_tokens: np.ndarray) -> tuple:
        """For `ISDSpeculator.set_active_loras`: the adapter id of each request, nothing, and all active adapters."""
        return self.lora_ids[idx_mapping], None, self.get_activate_loras(req_ids)

    def get_activate_loras(self, req_ids: list[str]) -> set[Any]:
        """The requests' adapters and the draft adapter."""
        return super().get_activate_loras(req_ids) | {self.draft_lora}


class Mapping:
    """Writes a step's mapping straight into the buffers that vLLM's LoRA kernels read."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        wrappers = manager.punica_wrapper_mapping
        prefix = manager.mm_mapping.language_model[0] if manager.supports_mm else DEFAULT_LANGUAGE_WRAPPER_KEY
        self._wrapper = wrappers[prefix]

    def slot_of(self, lora_id: int) -> int:
        """The slot that holds an adapter."""
        return self._manager.lora_index_to_id.index(lora_id)

    def slots(self, ids: np.ndarray, device: torch.device) -> Tensor:
        """[B] int64 slots of the adapters `ids`, -1 for id 0."""
        if not ids.any():
            return torch.full((len(ids),), -1, dtype=torch.int64, device=device)
        table = {lora_id: slot for slot, lora_id in enumerate(self._manager.lora_index_to_id) if lora_id is not None}
        found = np.fromiter((table[i] if i > 0 else -1 for i in ids.tolist()), dtype=np.int64, count=len(ids))
        return async_tensor_h2d(found, device=device)

    def buffers(self) -> tuple[Tensor, Tensor]:
        """What vLLM reads the slots of token rows and of rows with logits from."""
        return self._wrapper._token_lora_indices, self._wrapper._sampler_indices

    def begin(self) -> tuple[Tensor, Tensor]:
        """The buffers of token rows and of rows with logits, to be filled as far as the step reaches; -1 elsewhere."""
        self._manager._last_mapping = None  # vLLM's own mapping is not in the buffers any more
        for buffer in self.buffers():
            buffer.fill_(-1)
        return self.buffers()

    def finish(self, tokens: int, rows: int) -> None:
        """What else the kernels read, made from the buffers."""
        wrapper = self._wrapper
        mapping = wrapper._token_lora_indices
        wrapper._embeddings_indices.view(-1)[:tokens] = mapping[:tokens].clamp(min=0) * self._manager.vocab_size
        wrapper.indices_len[:] = [tokens, rows, rows, tokens]
        wrapper.is_prefill, wrapper.no_lora = True, False
        if hasattr(wrapper, "token_mapping_meta"):
            fill_kernel_meta(wrapper.token_mapping_meta, mapping[:tokens])
            fill_kernel_meta(wrapper.prompt_mapping_meta, wrapper._sampler_indices[:rows])


def fill_kernel_meta(meta: Any, mapping: Tensor) -> None:
    """vLLM's LoRAKernelMeta for `mapping` ([tokens] slots, -1: none), without a wait for the device.

    vLLM lists the adapters that are present (`torch.unique`, which waits); here every slot has its place in the list,
    with a count of 0 if it is absent: the kernels leave such a group, and the group of -1, at once. The first group
    starts at 0, which vLLM wrote when it made the tensor; to write it here (`tensor[0] = 0`) would wait for the device.
    """
    tokens, groups = mapping.shape[0], meta.active_lora_ids.shape[0]
    meta.token_lora_mapping[:tokens].copy_(mapping)
    meta.token_indices_sorted_by_lora_ids[:tokens].copy_(mapping.sort(stable=True).indices)
    torch.arange(-1, groups - 1, out=meta.active_lora_ids)
    counts = torch.zeros_like(meta.num_tokens_per_lora)
    counts.scatter_add_(0, (mapping + 1).long(), torch.ones_like(mapping, dtype=counts.dtype))
    meta.num_tokens_per_lora.copy_(counts)
    meta.lora_token_start_loc[1:].copy_(counts.cumsum(0))
    meta.no_lora_flag_cpu.fill_(False)  # host tensors: nothing waits
    meta.num_active_loras_cpu.fill_(groups)
