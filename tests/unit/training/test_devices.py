"""Several devices: ways of accelerate that are refused by name, and blocks that do not depend on how many there are."""

from __future__ import annotations

import pytest

from vllm_idlm.training import config, devices


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, r"accelerate is set up for DEEPSPEED; allowed are .* FSDP with"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"},
            r"fsdp_version is 1; allowed is 2\. Fix: fsdp_version: 2",
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            "fsdp_cpu_ram_efficient_loading is true; allowed is false",
        ),
    ],
)
def test_other_ways_of_accelerate_are_refused_by_name(monkeypatch, given, said):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(config.ConfigError, match=said):
        devices.accelerator(config.Config(model="m", out="o", data=["d"], steps=1))
