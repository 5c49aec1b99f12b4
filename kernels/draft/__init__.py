"""Drawing of drafts at mask slots."""

from vllm_idlm.kernels.draft.naive import Proposal, propose

__all__ = ["Proposal", "propose"]
