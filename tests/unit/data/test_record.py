"""The record beside the samples: other settings are refused by name."""

from __future__ import annotations

import pytest

from tests.unit.data.test_plan import plan_settings
from vllm_idlm.data import record
from vllm_idlm.data.errors import DataError


def test_other_settings_are_refused_by_name(tmp_path):
    record.begin(tmp_path, plan_settings())
    record.begin(tmp_path, plan_settings(model="the same, by another name"))
    with pytest.raises(DataError, match=r"--max-tokens was 256, now 8; --seed was 0, now 1\. Give the same"):
        record.begin(tmp_path, plan_settings(max_tokens=8, seed=1))
    (tmp_path / record.FILE).write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        record.begin(tmp_path, plan_settings())
    (tmp_path / record.FILE).unlink()
    (tmp_path / "train-00000.jsonl").write_text("")
    with pytest.raises(DataError, match=r"holds train-00000.jsonl but no provenance.json"):
        record.begin(tmp_path, plan_settings())
