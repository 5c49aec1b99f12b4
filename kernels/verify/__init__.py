"""Exact verification of drafts: `verify` for ragged batches, `verify_rows` for what only the device knows."""

from vllm_idlm.kernels.verify.naive import Verdict, verify
from vllm_idlm.kernels.verify.rows import Rows
from vllm_idlm.kernels.verify.rows import Verdict as RowsVerdict

__all__ = ["Rows", "RowsVerdict", "Verdict", "verify", "verify_rows"]


def verify_rows(rows: Rows) -> RowsVerdict:
    """`rows.verify_rows` (which gives shapes and the rule), by Triton where vLLM has it, else in plain torch."""
    from vllm.triton_utils import HAS_TRITON

    if HAS_TRITON:
        from vllm_idlm.kernels.verify.triton import verify_rows as run
    else:
        from vllm_idlm.kernels.verify.rows import verify_rows as run
    return run(rows)
