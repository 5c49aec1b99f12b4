"""The planner's errors against measured results: how large they are by source, and which results count."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tests.support.paths import RESULTS
from vllm_idlm import measured
from vllm_idlm.cli import app


def test_the_whole_published_table_and_every_cpu_figure():
    """Mean errors of the fit, by source: a change to the model or to a device's figures must not make them worse."""
    found = {
        (source, figure): mean for source, figure, _, mean, _ in measured.summary(measured.errors(measured.points()))
    }
    allowed = {"the authors' table, I-DLM-8B on one H100": 0.06, "overhead-cpu.json": 0.08, "coverage-cpu.json": 0.2}
    for (source, figure), mean in found.items():
        assert mean < allowed.get(source, 0.25), (source, figure)
    assert {source for source, _ in found} >= set(allowed)


def test_tpf_by_the_formula_is_the_served_one():
    found = measured.tpf_errors()
    assert len(found) >= 4
    for what, served, planned in found:
        assert planned == pytest.approx(served, rel=0.02), what


def test_results_of_another_processor_are_named_and_not_held_against_this_one(tmp_path):
    record = json.loads((RESULTS / "coverage-cpu.json").read_text(encoding="utf-8"))
    mine, other = tmp_path / "mine.json", tmp_path / "other.json"
    mine.write_text(json.dumps(record), encoding="utf-8")
    record["machine"]["cpu"] = "Abacus 3000"
    other.write_text(json.dumps(record), encoding="utf-8")
    sources = {p.source for p in measured.points(tmp_path)}
    assert "mine.json" in sources
    assert "other.json" not in sources
    assert measured.elsewhere(tmp_path) == [("other.json", "Abacus 3000")]
    done = CliRunner().invoke(app, ["plan", "--validate", "--results", str(tmp_path)])
    assert "other.json, measured on Abacus 3000" in " ".join(done.output.split())
