"""`idlm serve`: the arguments that vLLM gets."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner

from vllm_idlm.cli import app, serve

RUNNER = CliRunner()

ISD = ["--speculative-config", '{"method": "isd", "n": 4}']


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["smollm2-135m-risd"], ["smollm2-135m-risd", *ISD]),
        (["smollm2-135m-risd", "--port", "8001"], ["smollm2-135m-risd", *ISD, "--port", "8001"]),
        (["smollm2-135m-risd", "--plain", "--port", "1"], ["smollm2-135m-risd", "--port", "1"]),
        (["org/model", "--dtype", "auto"], ["org/model", "--dtype", "auto"]),
        (["idlm-8b", "--spec-method=isd"], ["idlm-8b", "--spec-method=isd"]),
        (["idlm-8b", "--speculative_config", "{}"], ["idlm-8b", "--speculative_config", "{}"]),
        (["idlm-8b", "--speculative-config.n", "2"], ["idlm-8b", "--speculative-config.n", "2"]),
        (["idlm-8b", "--config", "own.yaml"], ["idlm-8b", "--config", "own.yaml"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_serve_arguments(given, expected):
    assert serve.vllm_arguments(given) == ["serve", *expected]


@pytest.mark.parametrize("given", [[], ["--port", "8000"]], ids=["nothing", "flag-first"])
def test_serve_wants_the_model_first(given):
    shown = RUNNER.invoke(app, ["serve", *given])
    assert shown.exit_code == 2
    assert "takes the model first" in shown.output


def test_serve_hands_its_arguments_to_vllm(monkeypatch):
    """The whole command, up to the call of vLLM's own main."""
    import vllm.entrypoints.cli.main as vllm_cli

    seen = []
    monkeypatch.setattr(vllm_cli, "main", lambda: seen.append(list(sys.argv)))
    monkeypatch.setattr(sys, "argv", ["idlm"])
    shown = RUNNER.invoke(app, ["serve", "smollm2-135m-risd", "--port", "8001", "--enforce-eager"])
    assert shown.exit_code == 0, shown.output
    assert seen == [["vllm", "serve", "smollm2-135m-risd", *ISD, "--port", "8001", "--enforce-eager"]]
