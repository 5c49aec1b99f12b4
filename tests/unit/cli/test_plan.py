"""`idlm plan`: what it prints, its report on the planner's errors, and what is refused."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from vllm_idlm.cli import app


def test_the_command():
    done = CliRunner().invoke(app, ["plan", "idlm-32b", "--tensor-parallel", "2", "--acceptance", "0.9,0.85,0.8"])
    assert done.exit_code == 0, done.output
    assert '"method": "isd"' in done.output
    assert "GiB a device at 128 requests" in done.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["no-such-model"], "neither a folder"),
        (["idlm-8b", "--hardware", "abacus"], "neither a file nor one of"),
        (["idlm-8b", "--acceptance", "1.4"], "from 0 to 1"),
        (["idlm-8b", "--acceptance", "high"], "give numbers"),
        (["idlm-8b", "--concurrency", "0"], "at least 1"),
        (["idlm-8b", "--coverage", "most"], "allowed are last and auto"),
    ],
)
def test_bad_input(arguments, says):
    done = CliRunner().invoke(app, ["plan", *arguments])
    assert done.exit_code == 2
    assert says in " ".join(done.output.split())


def test_validation_reports_every_source():
    done = CliRunner().invoke(app, ["plan", "--validate"], terminal_width=200)
    assert done.exit_code == 0, done.output
    for words in ("overhead-cpu.json", "coverage-cpu.json", "mean error", "TPF by the formula"):
        assert words in done.output
