"""vLLM's CPU wrapper for LoRA, its own and ours: rows without an adapter keep their bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vllm_idlm.kernels.lora import naive

from tests.unit.kernels.test_lora import BF16, F32, assert_close, compiled, make  # noqa: F401


def wrapper_class():
    pytest.importorskip("vllm")
    from vllm_idlm.punica import RowPunicaWrapper

    return RowPunicaWrapper


def mixed_step(cls, rows: int = 7, max_seqs: int = 8):
    """A wrapper in the middle of an R-ISD step: clean rows, then mask rows with adapter 5 in slot 1; adapter 9 in 0."""
    from vllm.lora.layers import LoRAMapping

    wrapper = cls(256, max_seqs, torch.device("cpu"))
    ids = [0] * (rows - 3) + [5] * 3
    wrapper.update_metadata(LoRAMapping(tuple(ids), tuple(ids), is_prefill=True), [9, 5], 3, 100)
    return wrapper


def test_vllms_own_wrapper_touches_clean_rows_and_ours_does_not():
    ours = wrapper_class()
    import vllm
    from packaging.version import Version
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from vllm_idlm.ledger.cpu import stock_touches_other_rows

    y, x, _, a, b, widths = make("qkv", 7, F32, slots=2)
    want = y.clone()
    naive.add_lora_rows(want, x, torch.tensor([-1] * 4 + [1] * 3), a, b, widths)
    stock, rows = y.clone(), y.clone()
    mixed_step(PunicaWrapperCPU).add_lora_linear(stock, x, tuple(a), tuple(b), 1.0, tuple(widths))
    mixed_step(ours).add_lora_linear(rows, x, tuple(a), tuple(b), 1.0, tuple(widths))
    assert_close(rows, want)
    assert torch.equal(rows[:4], y[:4])
    mended = Version(vllm.__version__) >= Version("0.33")
    assert torch.equal(stock[:4], y[:4]) == mended
    assert stock_touches_other_rows() != mended


def test_alternating_rows_overflow_vllms_buffers_and_not_ours():
    ours = wrapper_class()
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    mapping = LoRAMapping((0, 5) * 20, (0, 5) * 20, is_prefill=True)
    with pytest.raises(RuntimeError):
        PunicaWrapperCPU(256, 8, torch.device("cpu")).update_metadata(mapping, [9, 5], 3, 100)
    wrapper = ours(256, 8, torch.device("cpu"))
    wrapper.update_metadata(mapping, [9, 5], 3, 100)
    assert wrapper.token_lora_indices.tolist() == [-1, 1] * 20
    assert wrapper.sampler_indices.tolist() == [-1, 1] * 20


def test_a_shorter_step_leaves_nothing_of_the_longer_one_before():
    wrapper = mixed_step(wrapper_class(), rows=12)
    wrapper.set_rows(np.array([-1, 1]), np.array([1]))
    assert wrapper._token_lora_indices.tolist() == [-1, 1] + [-1] * 254
    assert wrapper._sampler_indices.tolist() == [1] + [-1] * 255
    assert wrapper._embeddings_indices.tolist() == [0, 100] + [0] * 254
    assert not wrapper.no_lora
    wrapper.set_rows(np.array([-1]), np.array([-1]))
    assert wrapper.no_lora


def test_an_adapter_in_no_slot_is_an_error():
    wrapper = mixed_step(wrapper_class())
    assert [wrapper.slot_of(i) for i in (0, 9, 5)] == [-1, 0, 1]
    with pytest.raises(ValueError, match="3"):
        wrapper.slot_of(3)


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16], ids=["float32", "bfloat16", "float16"])
def test_logits_embeddings_and_the_two_halves(dtype):
    """float16 and split adapters take the plain path; all of it must leave clean rows alone."""
    wrapper = mixed_step(wrapper_class())
    slots = torch.tensor([-1] * 4 + [1] * 3)
    y, x, _, a, b, widths = make("qkv", 7, dtype, slots=2)
    want = y.clone()
    naive.add_lora_rows(want, x, slots, a, b, widths)

    logits = y[:, :576].clone()
    wrapper.add_lora_logits(logits, x, a[0], b[0], 1.0)
    linear, halves = y.clone(), y.clone()
    wrapper.add_lora_linear(linear, x, tuple(a), tuple(b), 1.0, tuple(widths))
    buffer = torch.zeros(3, 7, 32)
    wrapper.add_shrink(buffer, x, tuple(a), 1.0)
    wrapper.add_expand(halves, buffer, tuple(b), tuple(widths), offset_start=0, add_input=True)
    embedded, looked_up = y[:, :576].clone(), torch.randn(7, 32, dtype=dtype)
    wrapper.add_lora_embedding(embedded, looked_up, b[0], add_input=True)

    for got, expected in ((logits, want[:, :576]), (linear, want), (halves, want)):
        torch.testing.assert_close(got.float(), expected.float(), rtol=2**-7, atol=2e-3)
        assert torch.equal(got[:4], y[:4, : got.shape[1]])
    added = looked_up[4:].float() @ b[0][1, 0].float().T
    torch.testing.assert_close(embedded[4:].float(), y[4:, :576].float() + added, rtol=2**-7, atol=2e-3)
    assert torch.equal(embedded[:4], y[:4, :576])
