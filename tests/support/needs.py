"""Skip tests on a machine that lacks what they need."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from vllm_idlm.evaluate import sandbox
from vllm_idlm.evaluate.benchmarks import EvalError


def _confined() -> bool:
    try:
        return sandbox.run("print(1)").ok
    except EvalError:
        return False


needs_sandbox = pytest.mark.skipif(not _confined(), reason="the system allows neither a network namespace nor seccomp")
needs_harness = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed (pip install '.[eval]')"
)
