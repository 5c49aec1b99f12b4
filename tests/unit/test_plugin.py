"""The plugin's entry point: cheap, applied once, and found in fresh processes and Ray's actors."""

from __future__ import annotations

import pytest

from tests.support.processes import python
from vllm_idlm import plugin


def test_registering_twice_patches_once():
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    before = EngineArgs.create_speculative_config
    plugin.register()
    assert EngineArgs.create_speculative_config is before


def test_the_plugin_imports_neither_torch_nor_vllm():
    heavy = "sorted({'torch', 'vllm', 'transformers', 'pydantic'} & set(sys.modules))"
    assert python(f"import sys; from vllm_idlm.plugin import register; register(); print({heavy})") == "[]"


_STATES = "from vllm_idlm.patching import live; print({s.kind for s in live.check(imports=True).values()})"


@pytest.mark.heavy
def test_vllm_finds_the_plugin_in_a_fresh_process():
    begin = "from vllm.plugins import load_general_plugins; load_general_plugins()"
    assert python(f"{begin}; {_STATES}") == "{'fits'}"
