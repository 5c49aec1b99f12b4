"""Every form of ISD's kernels that a service launches, launched once at start: nothing compiles while requests wait.

A Triton kernel is compiled anew for other dtypes, for pointers and strides that are multiples of 16 or not, and for
other constants. Batch sizes change none of these here, so one made-up request is enough; it has no drafts and no masks,
which the kernels find out for themselves and do next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_idlm.kernels.gate import Gate, gate
from vllm_idlm.kernels.verify import verify_rows

if TYPE_CHECKING:
    from vllm_idlm.v2.speculator import ISDSpeculator


@torch.inference_mode()
def kernels(isd: ISDSpeculator) -> None:
    """Launch the gate, verification with and without options, and drafting; before any request has come."""
    batch = InputBatch.make_dummy(1, 1, isd.runner.input_buffers)
    step = isd.lay_out(batch)
    first, second = (torch.empty(1, dtype=dtype, device=isd.device) for dtype in _adapter_dtypes(isd))
    own = torch.full((1,), -1, dtype=torch.int64, device=isd.device)
    gate(step.layout, own, -1, Gate(step.drafts, step.masks, first, second))
    step.slots = step.drafts + step.masks
    sampler = isd.runner.rejection_sampler
    step.logits = some_logits(isd, 1)
    verify_rows(sampler.rows(step, step.logits))
    processed = torch.zeros(1, step.logits.shape[1], dtype=torch.float32, device=isd.device)
    verdict = verify_rows(sampler.rows(step, step.logits, processed, torch.zeros_like(step.position)))
    states = sampler.sampler.sampling_states
    isd.draft(step, verdict.emitted, isd.settings.masks, states.temperature.gpu, states.seeds.gpu)


def _adapter_dtypes(isd: ISDSpeculator) -> tuple[torch.dtype, torch.dtype]:
    """Of the buffers that the gate writes the adapters of token rows and of rows with logits to."""
    if isd.mapping is None:
        return torch.int32, torch.int32
    return tuple(buffer.dtype for buffer in isd.mapping.buffers())


def some_logits(isd: ISDSpeculator, rows: int, hidden: Tensor | None = None) -> Tensor:
    """Logits as a forward has them: [rows, V] in the head's dtype and layout, of hidden states that are all zeros.

    hidden: any hidden states of this model, for their size and dtype; None: what its configuration says.
    """
    runner: Any = isd.runner
    if hidden is None:
        shape = rows, runner.model_config.get_hidden_size()
        hidden = torch.zeros(shape, dtype=runner.model_config.dtype, device=isd.device)
    else:
        hidden = hidden.new_zeros(rows, hidden.shape[1])
    if runner.lora_config is not None:  # a head with LoRA reads a mapping of so many rows; none has an adapter
        runner._set_active_loras((0,) * rows, (0,) * rows, set())
    return runner.model.compute_logits(hidden)
