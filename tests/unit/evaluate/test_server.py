"""The servers of `idlm eval`: methods by name."""

from __future__ import annotations

import pytest

from vllm_idlm.evaluate import server


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("plain", None),
        ("isd", {"method": "isd", "n": 4, "coverage": "last", "lora": None}),
        ("risd:8:all", {"method": "isd", "n": 8, "coverage": "all"}),
    ],
)
def test_methods(name, config):
    assert server.method(name).speculation == config
