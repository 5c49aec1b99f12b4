"""Published comparisons: the documents have the recorded results, and publishing puts them there."""

from __future__ import annotations

import re

import pytest

from benchmarks import publish
from tests.support.paths import RESULTS, ROOT
from tests.support.rounds import asked, isd_round, place, plain_round
from vllm_idlm.bench import report
from vllm_idlm.bench.store import Record, Store
from vllm_idlm.cli import provenance


def test_results_in_the_documents_are_the_recorded_ones():
    """Between its marks, docs/benchmarks.md has the tables of the report in benchmarks/results, and nothing else."""
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    names = re.findall(r"<!-- bench ([\w-]+) -->", page)
    assert names
    for name in names:
        record = RESULTS / f"{name}.json"
        if not record.is_file():  # nothing measured, nothing told
            assert f"<!-- bench {name} -->\n<!-- end -->" in page
            continue
        assert publish.insert(page, name, report.load(record)) == page
        pictures = re.findall(rf"\(images/({name}-[\w-]+\.png)\)", page)
        assert len(pictures) == 4
        assert all((ROOT / "docs" / "images" / picture).is_file() for picture in pictures)


def test_publishing_replaces_what_stands_between_the_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench it -->\nstale words\n<!-- end -->\nafter\n")
    store = Store(asked(tmp_path, concurrency=[1], temperatures=[0.0]))
    store.begin(resume=False, fresh=False)
    store.add([Record(place(0), "plain", plain_round()), Record(place(0), "isd", isd_round())])
    store.state["facts"] = {"plain": {"compiled": False, "dtype": "float32"}}
    report.write(report.make(store, provenance.collect()), tmp_path)
    publish.publish(tmp_path, "it", page, tmp_path / "results")
    text = page.read_text()
    assert text.startswith("before\n<!-- bench it -->\n\n**Greedy: speed**")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "stale words" not in text
    assert (tmp_path / "results" / "it.json").is_file()
    assert (tmp_path / "images" / "it-speedup.png").is_file()
    with pytest.raises(ValueError, match="has no '<!-- bench other -->'"):
        publish.publish(tmp_path, "other", page, tmp_path / "results")
