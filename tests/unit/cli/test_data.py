"""`idlm data`: options that are refused."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from vllm_idlm.cli import data as command

APP = typer.Typer()
APP.command()(command.data)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--temperatures", "0;1"], "--temperatures 0;1"),
        (["--held-out", "2"], "--held-out 2"),
        (["--recipe", "songs"], "allowed are chat"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--model", "no/such-model"], "no zoo name, no folder"),
    ],
)
def test_wrong_options_end_the_command(tmp_path, options, said):
    shown = CliRunner().invoke(APP, [str(tmp_path / "out"), "--count", "4", *options])
    assert shown.exit_code == 2
    assert said in " ".join(shown.output.split())
    assert not (tmp_path / "out").exists()
