"""`idlm doctor`: its findings and fixes, and when it starts no engine."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from vllm_idlm.cli import app, checks, child

RUNNER = CliRunner()


@pytest.mark.heavy
def test_doctor_is_content_here():
    shown = RUNNER.invoke(app, ["doctor"])
    assert shown.exit_code == 0, shown.output
    assert "nothing is broken" in shown.output


def test_doctor_fails_with_the_fix(monkeypatch):
    monkeypatch.setattr(checks, "CHECKS", (lambda: iter([checks.Finding("x", "broken", "it is bad", "mend it")]),))
    shown = RUNNER.invoke(app, ["doctor"])
    assert shown.exit_code == 1
    assert "mend it" in shown.output


@pytest.mark.parametrize("given", [["smollm2-135m-risd"], ["--n", "4"], ["--json", "x"], ["--eager"]])
def test_options_of_the_engine_want_the_engine(given):
    shown = RUNNER.invoke(app, ["doctor", *given])
    assert shown.exit_code == 2
    assert "only with --engine" in " ".join(shown.output.split())


def test_no_engine_is_started_where_something_is_broken(monkeypatch):
    monkeypatch.setattr(checks, "CHECKS", (lambda: iter([checks.Finding("x", "broken", "it is bad", "mend it")]),))
    monkeypatch.setattr(child, "work", lambda *_: pytest.fail("an engine was started"))
    shown = RUNNER.invoke(app, ["doctor", "--engine"])
    assert shown.exit_code == 1
    assert "No engine was started" in shown.output
