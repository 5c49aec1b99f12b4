"""Exact verification of drafts."""

from vllm_idlm.kernels.verify.naive import Verdict, verify

__all__ = ["Verdict", "verify"]
