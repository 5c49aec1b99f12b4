"""`idlm data` on a real engine: a run cut short goes on with the same data."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from typer.testing import CliRunner

from tests.unit.cli.test_data import APP
from vllm_idlm.data import files, keys, prompts, record, samples
from vllm_idlm.fingerprint import fingerprint


def _run(folder, *options):
    fixed = ["--count", "6", "--answers", "2", "--max-tokens", "16", "--shard", "2", "--held-out", "0.3"]
    return CliRunner().invoke(APP, [str(folder), *fixed, "--dtype", "float32", "--eager", *options])


@pytest.mark.vllm
def test_run_cut_short_goes_on_with_the_same_data(tmp_path, smol):
    """Six prompts, two answers each; then a shard is lost, then all are there, then the settings are others."""
    from transformers import AutoTokenizer

    shown = _run(tmp_path)
    assert shown.exit_code == 0, shown.output
    shards = sorted(file.name for file in tmp_path.glob("*.jsonl"))
    before = {name: (tmp_path / name).read_bytes() for name in shards}
    _check_rows(tmp_path, AutoTokenizer.from_pretrained(smol), shards)
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in shards}

    (tmp_path / shards[-1]).unlink()
    (tmp_path / f".{shards[-1]}.tmp").write_text("half a li")
    shown = _run(tmp_path)
    assert shown.exit_code == 0, shown.output
    assert {name: (tmp_path / name).read_bytes() for name in shards} == before
    changed = [name for name in shards if (tmp_path / name).stat().st_mtime_ns != times[name]]
    assert changed == [shards[-1]]
    written = json.loads((tmp_path / record.FILE).read_text())
    assert [run["shards"] for run in written["runs"]] == [[*shards], [shards[-1]]]
    assert written["settings"]["fingerprint"] == fingerprint(smol)
    assert written["counts"]["samples"] == 12

    assert "shards are there already" in _run(tmp_path).output
    shown = _run(tmp_path, "--temperatures", "0,1")
    assert shown.exit_code == 2
    assert "--temperatures was 0,0.7,1, now 0,1" in " ".join(shown.output.split())


def _check_rows(folder, tokenizer, shards):
    """Every prompt twice on one side; the ids are the template's and the texts'; seeds and temperatures as planned."""
    rows = {name: [row for _, row in files.rows(folder / name)] for name in shards}
    asked = {p.key: p for p in prompts.built_in("chat", 6, 0)}
    assert Counter(row["prompt_key"] for found in rows.values() for row in found) == dict.fromkeys(asked, 2)
    for name, found in rows.items():
        assert len(found) in (2, 4)
        for row in found:
            prompt = asked[row["prompt_key"]]
            assert name.startswith(keys.side(prompt.key, 0.3))
            assert row["prompt_ids"] == samples.prompt_ids(tokenizer, prompt.messages, "")
            assert row["messages"][-1]["content"] == row["text"]
            text = tokenizer.decode(row["answer_ids"], skip_special_tokens=True)
            assert text.rstrip("\ufffd") == row["text"].rstrip("\ufffd")  # vLLM leaves out half a character
            ended = row["answer_ids"][-1] == tokenizer.eos_token_id
            assert ended == (row["finish_reason"] == "stop")
            assert ended or len(row["answer_ids"]) == 16
    both = samples.read(folder, split=None)
    assert len(both) == 12
    assert {s.prompt_key for s in samples.read(folder, "eval")}.isdisjoint(
        s.prompt_key for s in samples.read(folder, "train")
    )
