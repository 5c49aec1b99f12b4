"""The scripts that a GPU machine runs, on a tiny shape: they run to the end, and what they count is right."""

from __future__ import annotations

import json

import pytest

from benchmarks import common, overhead
from benchmarks.kernels import __main__ as kernels

pytestmark = pytest.mark.vllm


def run(monkeypatch, tmp_path, main, *words):
    """The saved result of a benchmark's `main` with these arguments."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["benchmark", *words, "--name", "found"])
    main()
    return json.loads((tmp_path / "found.json").read_text())["result"]


def test_overhead_with_synthetic_acceptance(monkeypatch, tmp_path):
    """Dummy weights accept nothing; at a synthetic rate of 0.9 the tokens per forward are the formula's, 2.92, and with
    masks behind every accepted prefix the same drafts give E = 3.44."""
    words = ["--shape", "tiny", "--synthetic", "0.9", "--rank", "8", "--dtype", "float32", "--eager"]
    words += ["--methods", "plain,risd,isd:all", "--batches", "4", "--rounds", "2", "--tokens", "90"]
    found = run(monkeypatch, tmp_path, overhead.main, *words)
    row = found["rows"][0]
    assert row["risd"]["TPF"] == pytest.approx(2.92, rel=0.1)
    assert row["risd"]["speedup"] == pytest.approx(row["risd"]["TPF"] / row["risd"]["OH"], rel=0.02)
    assert row["isd:all"]["TPF"] == pytest.approx(3.44, rel=0.1)


def test_kernels(monkeypatch, tmp_path):
    words = ["--batches", "2", "--vocabulary", "500", "--repeats", "1", "--context", "40"]
    found = run(monkeypatch, tmp_path, kernels.main, *words)
    assert [row["kernel"] for row in found["rows"]] == ["verify", "draft", "gate", "tail"]
    assert all(row["ms"] > 0 and row["bytes"] > 0 for row in found["rows"])
