"""`idlm models`: the whole zoo, and what is wrong with a file of it."""

from __future__ import annotations

from typer.testing import CliRunner

from vllm_idlm import zoo
from vllm_idlm.cli import app

RUNNER = CliRunner()


def test_models_lists_the_whole_zoo():
    shown = RUNNER.invoke(app, ["models"])
    assert shown.exit_code == 0
    assert all(name in shown.output for name in zoo.names())
    assert "151669" in shown.output
    assert "yifanyu/I-DLM-8B-lora-r128" in shown.output


def test_models_says_what_is_wrong_with_a_zoo_file(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    monkeypatch.setenv("VLLM_IDLM_CONFIGS", str(tmp_path))
    shown = RUNNER.invoke(app, ["models"])
    assert shown.exit_code == 1
    assert "mask_token_id: missing" in shown.output
