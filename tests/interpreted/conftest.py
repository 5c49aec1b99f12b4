"""Triton's kernels and vLLM's Model Runner V2 on the CPU, under Triton's interpreter.

vLLM counts Triton as absent where no driver is active. A stand-in backend named "cpu" makes it load the real kernels,
which TRITON_INTERPRET=1 then runs with numpy. Both must be set before torch, triton or vllm is imported, so these tests
have a process of their own: `pytest tests/interpreted` (`make test` runs it).
"""

import os
import sys

if "vllm" in sys.modules or "triton" in sys.modules:
    raise RuntimeError("tests/interpreted needs a pytest process of its own: python -m pytest tests/interpreted")

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"

from tests.support import triton_stand_in  # noqa: F401


def _log1p(x, *args, **kwargs):
    """What the interpreter lacks: libdevice's log1p, which vLLM's own sampler draws its noise with."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    return tl.tensor(TensorHandle(np.log1p(x.handle.data), x.handle.dtype), x.type)


from triton.language.extra import libdevice  # noqa: E402

libdevice.log1p = _log1p

import inspect  # noqa: E402

import pytest  # noqa: E402


def _remember_builtins() -> None:
    """Have the interpreter look for the language's builtins once, not at every call of a kernel or device function."""
    from triton import language as tl
    from triton.runtime import interpreter

    places = (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base)
    known = {
        place: [(name, member) for name, member in inspect.getmembers(place) if tl.core.is_builtin(member)]
        for place in places
    }

    def _patch_builtin(place, builder, scope):
        for name, member in known[place]:
            if getattr(place, name) is member:  # else a call around this one has replaced it
                interpreter._patch_attr(place, name, member, builder, scope)

    interpreter._patch_builtin = _patch_builtin


_remember_builtins()


@pytest.fixture(scope="session", autouse=True)
def _top_k_top_p_in_torch():
    """vLLM's Triton kernel for top-k and top-p does not run under the interpreter; its own torch form does."""
    from vllm.v1.sample.ops import topk_topp_sampler as ops

    def apply_top_k_top_p(logits, k, p, **_):
        return ops.apply_top_k_top_p_pytorch(logits, k, p)

    ops.apply_top_k_top_p_triton = apply_top_k_top_p


@pytest.fixture(scope="session", autouse=True)
def _grammar_bitmask_in_numpy():
    """Nor does its kernel that applies a grammar's bitmask (the interpreter refuses a dtype): the same in numpy."""
    import numpy as np
    import torch
    from vllm.v1.worker.gpu import structured_outputs as module

    def apply_grammar_bitmask(self, logits, input_batch, grammar_req_ids, grammar_bitmask):
        starts = input_batch.cu_num_logits_np
        for bits, entry in zip(grammar_bitmask, _bitmask_rows(self, input_batch, grammar_req_ids), strict=True):
            request, place = divmod(entry, self.mask_stride)
            if place < starts[request + 1] - starts[request]:
                allowed = np.unpackbits(bits.view(np.uint8), bitorder="little")[: logits.shape[1]]
                logits[starts[request] + place, torch.from_numpy(allowed == 0)] = float("-inf")

    module.StructuredOutputsWorker.apply_grammar_bitmask = apply_grammar_bitmask


def _bitmask_rows(worker, input_batch, grammar_req_ids):
    """What a grammar's bitmask has rows for: request * mask_stride + place, for every place in vLLM 0.33."""
    from vllm.v1.worker.gpu import structured_outputs as module

    if hasattr(module, "_build_grammar_mapping"):  # 0.32: for those places that the scheduler gave the request
        layout = input_batch.cu_num_logits_np, input_batch.num_draft_tokens_per_req, worker.num_bonus_tokens
        return module._build_grammar_mapping(input_batch.req_ids, grammar_req_ids, *layout, worker.mask_stride)
    firsts = [input_batch.req_ids.index(request) * worker.mask_stride for request in grammar_req_ids]
    return [first + place for first in firsts for place in range(worker.mask_stride)]
