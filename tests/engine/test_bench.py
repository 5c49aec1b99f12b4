"""`idlm bench`: a whole comparison on real engines, with a method that fails, shown again once finished."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from vllm_idlm.bench import config, report
from vllm_idlm.bench.store import Store
from vllm_idlm.cli import app

RUNNER = CliRunner()


@pytest.fixture(scope="module", params=[(), pytest.param(("ngram",), marks=pytest.mark.slow)], ids=["isd", "ngram too"])
def compared(smol, adapter, tmp_path_factory, request):
    """A small comparison by the command: methods that run (ngram compiles for two minutes), one that cannot."""
    folder = tmp_path_factory.mktemp("bench")
    isd, eagle = {"method": "isd", "n": 3}, {"method": "eagle3", "num_speculative_tokens": 3}
    content = {
        "model": smol, "out": str(folder / "out"), "concurrency": [2], "requests": 4, "temperatures": [0, 1],
        "max_tokens": 24, "rounds": 1, "warm_up_tokens": 4,
        "engine": {
            "dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 4,
            "kv_cache_memory_bytes": 200_000_000, "enable_prefix_caching": False,
        },
        "methods": [
            "plain",
            {"name": "last", "speculative": {**isd, "coverage": "last", "lora": adapter, "mask_token_id": 16}},
            *request.param,
            {"name": "gone", "speculative": {**eagle, "model": str(folder / "gone")}},
        ],
    }  # fmt: skip
    (folder / "c.yaml").write_text(json.dumps(content))  # JSON is YAML
    ran = RUNNER.invoke(app, ["bench", str(folder / "c.yaml")])
    assert ran.exit_code == 0, ran.output
    return folder, report.load(folder / "out"), ran.output


@pytest.mark.vllm
def test_methods_run_side_by_side_and_all_counts_agree(compared):
    folder, found, _ = compared
    names = [name for name in ("plain", "last", "ngram") if name in found["engines"]]
    assert names[:2] == ["plain", "last"]
    assert [(row["method"], row["temperature"]) for row in found["rows"]] == [
        (name, t) for name in names for t in (0.0, 1.0)
    ]
    for row in found["rows"]:
        assert row["tokens"] == 4 * 24
        assert [c for c in row["checks"] if c["ok"] is False] == []
        assert row["itl_ms"]["p50"] > 0
        assert row["ttft_ms"]["p50"] > 0
        if not row["temperature"]:
            assert (row["identical"], row["compared"]) == (4, 4)  # greedy, float32
    assert found["rows"][2]["TPF"] > 1.1
    assert found["engines"]["last"]["isd"]["coverage"] == "last"
    assert (folder / "out" / "speedup.png").stat().st_size > 3000


@pytest.mark.vllm
def test_a_method_that_fails_is_told_in_vllms_words(compared):
    _, found, shown = compared
    assert list(found["failures"]) == ["gone"]
    assert "Invalid repository ID or local directory specified" in found["failures"]["gone"]["message"]
    assert "gone failed (start)" in shown


@pytest.mark.vllm
def test_a_finished_comparison_is_only_shown_again(compared, tmp_path):
    folder, found, _ = compared
    without = ["methods=" + json.dumps(found["asked"]["methods"][:-1]), f"out={tmp_path / 'out'}"]
    content = json.loads((folder / "c.yaml").read_text())
    (tmp_path / "c.yaml").write_text(json.dumps(content))
    store = Store(config.load(tmp_path / "c.yaml", without))
    old = Store(config.load(folder / "c.yaml"))
    old._read()
    store.begin(resume=False, fresh=False)
    store.add(list(old.records.values()))
    store.state["facts"] = found["engines"]
    store.save()
    ran = RUNNER.invoke(app, ["bench", str(tmp_path / "c.yaml"), *without, "--resume"])
    assert ran.exit_code == 0, ran.output
    assert report.load(tmp_path / "out")["rows"] == found["rows"]
