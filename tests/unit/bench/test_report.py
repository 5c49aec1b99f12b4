"""The report of a comparison: its tables, pictures, failures and checks."""

from __future__ import annotations

import json

import pytest

from tests.support.rounds import asked, isd_round, place, plain_round
from vllm_idlm.bench import plots, report
from vllm_idlm.bench.store import Record, Store
from vllm_idlm.cli import provenance


@pytest.mark.heavy
def test_report_has_tables_pictures_and_failures(tmp_path):
    made = asked(tmp_path, concurrency=[1], temperatures=[0.0])
    store = Store(made)
    store.begin(resume=False, fresh=False)
    for number in range(2):
        store.add([Record(place(number), "plain", plain_round()), Record(place(number), "isd", isd_round())])
    store.state["failures"]["suffix"] = {
        "where": "start",
        "message": "ImportError: no arctic\n[type=x]\nFor further information visit y",
    }
    facts = {"compiled": True, "dtype": "bfloat16"}
    store.state["facts"] = {"plain": facts, "isd": facts}
    found = report.make(store, provenance.collect())
    text = report.markdown(found)
    assert "| 1 | isd | 12.0 | 0.82 | 8.0 |" in text
    assert "`suffix` did not run (start); vLLM says: `ImportError: no arctic`" in text
    assert "Checks: 8 of 8 hold" in text
    assert len(plots.draw(found, tmp_path)) == 8
    assert all(file.stat().st_size > 3000 for file in plots.draw(found, tmp_path))
    assert report.load(report.write(found, tmp_path)) == json.loads((tmp_path / "report.json").read_text())
