"""Drawing of drafts at mask slots: `propose` for ragged batches, `draft_rows` for what only the device knows."""

from torch import Tensor
from vllm_idlm.kernels.draft.naive import Proposal, confidence, propose
from vllm_idlm.kernels.draft.rows import MaskRows

__all__ = ["MaskRows", "Proposal", "confidence", "draft_rows", "propose"]


def draft_rows(rows: MaskRows, drafts: Tensor, proposal: Tensor | None) -> None:
    """`rows.draft_rows` (which gives shapes and the rule), by Triton where vLLM has it, else in plain torch."""
    from vllm.triton_utils import HAS_TRITON

    if HAS_TRITON:
        from vllm_idlm.kernels.draft.triton import draft_rows as run
    else:
        from vllm_idlm.kernels.draft.rows import draft_rows as run
    run(rows, drafts, proposal)
