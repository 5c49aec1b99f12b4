"""A worker at its start: one of another version, or without the plugin, refuses."""

from __future__ import annotations

import pytest

from vllm_idlm import __version__, engine_state, patching
from vllm_idlm.engine_args import VERSION
from vllm_idlm.settings import SettingsError


@pytest.mark.parametrize("theirs", ["9.9", None])
def test_a_worker_of_another_version_refuses_to_start(theirs):
    with pytest.raises(SettingsError, match=f"has vllm-idlm {__version__}, .* vllm-idlm {theirs}: every rank"):
        engine_state.same_plugin({VERSION: theirs})


def test_a_worker_that_did_not_load_the_plugin_refuses_to_start(monkeypatch):
    monkeypatch.setattr(patching, "installed", lambda: False)
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(SettingsError, match="VLLM_PLUGINS='other' there leaves idlm out"):
        engine_state.same_plugin({VERSION: __version__})
