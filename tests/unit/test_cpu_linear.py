"""The setting that chooses the kernel of products on CPUs, and machines without a compiler."""

from __future__ import annotations

import pytest
import torch
from vllm_idlm.kernels import linear, native

from vllm_idlm import cpu_linear
from vllm_idlm.settings import ISDSettings, SettingsError


def test_a_machine_without_a_compiler_keeps_vllms(monkeypatch):
    def fails():
        raise native.BuildError("no C++ compiler found")

    layer = torch.nn.Linear(64, 20, bias=False)
    monkeypatch.setattr(linear, "load", fails)
    assert not cpu_linear.take(layer)
    assert not hasattr(layer, "cpu_linear")
    monkeypatch.undo()
    assert cpu_linear.take(layer)
    assert not cpu_linear.take(torch.nn.Linear(60, 20, bias=False)), "not whole vectors"


def test_the_setting(monkeypatch):
    def resolved(asked, dtype, slow=True):
        monkeypatch.setattr(cpu_linear, "slow_at_bfloat16", lambda: slow)
        return cpu_linear.resolve(ISDSettings(cpu_linear=asked), dtype).cpu_linear

    assert resolved("auto", torch.bfloat16) == "rows"
    assert resolved("auto", torch.bfloat16, slow=False) == "vllm"
    assert resolved("auto", torch.float32) == "vllm"
    assert resolved("rows", torch.float32, slow=False) == "rows"
    assert resolved("vllm", torch.bfloat16) == "vllm"
    with pytest.raises(
        SettingsError, match=r'"cpu_linear": "rows" is for models in bfloat16 or float32 on CPUs; .*float16'
    ):
        resolved("rows", torch.float16)


def test_without_a_compiler_auto_is_vllms_and_rows_is_refused(monkeypatch):
    def fail():
        raise native.BuildError("no C++ compiler found")

    monkeypatch.setattr(linear, "load", fail)
    monkeypatch.setattr(cpu_linear, "slow_at_bfloat16", lambda: True)
    assert cpu_linear.resolve(ISDSettings(), torch.bfloat16).cpu_linear == "vllm"
    with pytest.raises(SettingsError, match=r'"cpu_linear": "rows": no C\+\+ compiler'):
        cpu_linear.resolve(ISDSettings(cpu_linear="rows"), torch.bfloat16)
