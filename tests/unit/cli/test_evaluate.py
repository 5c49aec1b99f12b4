"""`idlm eval`: the list of benchmarks, and what is refused before anything starts."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from tests.support.needs import needs_harness
from tests.unit.evaluate.test_benchmarks import PAPER
from vllm_idlm.cli import app


def test_the_list():
    done = CliRunner().invoke(app, ["eval", "--list"], terminal_width=160)
    assert done.exit_code == 0
    assert all(name in done.output for name in PAPER)


@needs_harness
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "name benchmarks"),
        (["gsm9k", "--model", "m"], "neither a YAML file nor one of"),
        (["gsm8k"], "one of the two"),
        (["gsm8k", "--model", "m", "--url", "a=http://x"], "one of the two"),
        (["gsm8k", "--model", "m", "--methods", "plain"], "at least two"),
        (["gsm8k", "--model", "m", "--methods", "plain,eagle"], "allowed are plain, isd and risd"),
        (["gsm8k", "--url", "http://x"], "NAME=VALUE"),
        (["gsm8k", "--model", "m", "--temperature", "hot"], "--temperature"),
        (["gsm8k", "--model", "m", "--data", "mmlu=x"], "not among the benchmarks"),
        (["gsm8k", "--model", "m", "--data", "gsm8k=no-such-folder"], "cannot be loaded"),
    ],
)
def test_what_is_refused_before_anything_starts(arguments, says, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = CliRunner().invoke(app, ["eval", *arguments, "--out", str(tmp_path / "out")])
    assert done.exit_code == 2, done.output
    assert says in " ".join(done.output.split())


@needs_harness
def test_a_server_that_is_not_there(tmp_path):
    urls = ["--url", "plain=http://127.0.0.1:9/v1", "--url", "isd=http://127.0.0.1:9/v1"]
    done = CliRunner().invoke(app, ["eval", "reasoning-gym", *urls, "--limit", "1", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "is it running" in " ".join(done.output.split())
