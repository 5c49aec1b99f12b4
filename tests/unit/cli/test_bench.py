"""`idlm bench`: configurations and overrides that are refused."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from vllm_idlm.cli import app

RUNNER = CliRunner()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("methods=[plain, spec]", "'spec' is no method known by name; known are plain, isd, isd-N, ngram, suffix"),
        ("methods=[eagle3]", "eagle3 needs its draft model"),
        ("methods=[plain, plain]", "plain is there twice"),
        ("concurrency=[0]", "concurrency from 1 on"),
        ("temperatures=[-1]", "temperatures from 0"),
        ("concurrency=[99]", "concurrency 99 is more than engine.max_num_seqs 16"),
        ("round=3", "round is no field; allowed are model, out"),
        ("rounds", "'rounds' is no override"),
        ("rounds=0", "rounds: 0 is not allowed"),
    ],
)
def test_wrong_settings_are_refused_by_name(override, said):
    shown = RUNNER.invoke(app, ["bench", "smollm2", override])
    assert shown.exit_code == 2
    assert said in " ".join(shown.output.split())


def test_unknown_configuration_says_which_there_are():
    shown = RUNNER.invoke(app, ["bench", "nothing"])
    assert shown.exit_code == 2
    assert "shipped are qwen3-8b, smollm2" in " ".join(shown.output.split())
