"""What each row of a forward is, and which LoRA adapter it takes: `gate`."""

from torch import Tensor
from vllm_idlm.kernels.gate.naive import Batch, Gate

__all__ = ["Batch", "Gate", "gate"]


def gate(batch: Batch, own: Tensor, draft_adapter: int, out: Gate) -> None:
    """`naive.gate` (which gives shapes and the rule), by Triton where vLLM has it, else in plain torch."""
    from vllm.triton_utils import HAS_TRITON

    if HAS_TRITON:
        from vllm_idlm.kernels.gate.triton import gate as run
    else:
        from vllm_idlm.kernels.gate.naive import gate as run
    run(batch, own, draft_adapter, out)
