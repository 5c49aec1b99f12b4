"""No operation of a step makes the host wait for the device: looked at is what torch dispatches in an engine's steps.

On the CPU nothing waits, but the operations are those of a GPU, where these wait:
* `tensor[0] = 5`: one element written by a copy from a CPU tensor (`tensor[:1] = 5` is a fill, which does not wait);
* `.item()`, truth values, `int(tensor)`;
* results whose size depends on the data: `nonzero`, boolean masks, `unique`, `repeat_interleave`;
* tensors made of lists (`torch.tensor([..])`, `x[[0, 1]]`): copies from memory that is not pinned.
Not seen: `.cpu()` and `.tolist()`, which are no operations on the CPU (`test_no_step_waits_for_the_device` has them).
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.interpreted.test_speculator import PROMPTS, ask, folders, start
from tests.support.engines import proposer

__all__ = ["folders"]  # a fixture
DATA_DEPENDENT = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
PACKAGE = Path(sys.modules["vllm_idlm"].__file__).parent
ROOTS = str(PACKAGE), str(Path(sys.modules["vllm_idlm.kernels"].__file__).parent)
BEHIND_THE_WAIT = "v2/output.py"  # runs once vLLM has waited for the step's tokens


class Waits(TorchDispatchMode):
    """Operations that would wait, asked for by a line of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        if waits(func, args) and (line := _ours()):
            self.seen.append(f"{func.overloadpacket.__name__} in {line}")
        return func(*args, **(kwargs or {}))


def waits(func, args) -> bool:
    name = func.overloadpacket.__name__
    if name == "copy_":
        return args[0].dim() == 0
    if name == "lift_fresh":
        return args[0].dim() > 0
    if name in ("index", "index_put_", "index_put"):
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return name in DATA_DEPENDENT or str(func) == "aten.repeat_interleave.Tensor"


def _ours() -> str | None:
    """The innermost line that is neither torch's nor this file's, if it is this package's."""
    for frame in reversed(traceback.extract_stack()[:-2]):
        if "/torch/" in frame.filename:
            continue
        mine = frame.filename.startswith(ROOTS) and not frame.filename.endswith(BEHIND_THE_WAIT)
        return f"{frame.filename}:{frame.lineno}" if mine else None
    return None


def as_if_in_the_package(code: str, **names):
    exec(compile(code, f"{PACKAGE}/v2/made_up.py", "exec"), names)


@pytest.mark.parametrize(
    ("code", "operation"),
    [
        ("t[0] = 5", "copy_"),
        ("m[1, 0] = 2.0", "copy_"),
        ("t[0].item()", "_local_scalar_dense"),
        ("bool(t[0])", "_local_scalar_dense"),
        ("t[t > 0]", "index"),
        ("m[[0, 1]]", "lift_fresh"),
        ("t.repeat_interleave(t)", "repeat_interleave"),
        ("t.nonzero()", "nonzero"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_check_can_fail(code, operation):
    with Waits() as waits:
        as_if_in_the_package(code, t=torch.ones(3, dtype=torch.int64), m=torch.ones(2, 3))
    assert waits.seen == [f"{operation} in {PACKAGE}/v2/made_up.py:1"]


def test_what_does_not_wait():
    with Waits() as waits:
        code = "t[1:] = t[:-1]; m[1].fill_(2); m[t - 1] = 0; t[:1] = 5; torch.where(t > 0, t, 0)"
        as_if_in_the_package(code, t=torch.ones(2, dtype=torch.int64), m=torch.ones(2, 3), torch=torch)
    assert waits.operations > 8
    assert waits.seen == []


@pytest.mark.vllm
@pytest.mark.parametrize("gated", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["gated", "full"])
def test_no_operation_of_a_step_waits(folders, gated):
    """Prompts, verification and cold steps, options, seeds, log-probabilities, extra groups; and, with an adapter, the
    metadata of vLLM's LoRA kernels, which its wrapper on the CPU does not have."""
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta

    llm = start(folders, gated, settings={"coverage": "all"})
    if gated:
        isd = proposer(llm)
        wrapper = isd.mapping._wrapper
        slots, most = len(isd.runner.lora_manager._adapter_manager.lora_index_to_id), isd.runner.max_num_tokens
        wrapper.token_mapping_meta = LoRAKernelMeta.make(slots, most, "cpu")
        wrapper.prompt_mapping_meta = LoRAKernelMeta.make(slots, most, "cpu")
    each = [
        {"temperature": 0.8, "seed": 3},
        {"repetition_penalty": 1.2, "logprobs": 2},
        {"temperature": 1.0, "top_p": 0.9},
    ]
    try:
        with Waits() as waits:
            ask(llm, PROMPTS[:3], 12, each)
            ask(llm, PROMPTS[:2], 6)
        assert waits.operations > 1000
        assert waits.seen == []
        if gated:
            assert int(wrapper.token_mapping_meta.num_tokens_per_lora.sum()) > 0, "the metadata was not written"
    finally:
        if gated:
            del wrapper.token_mapping_meta, wrapper.prompt_mapping_meta
