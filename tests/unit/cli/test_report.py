"""What is said of two outcomes, and the record that is written."""

from __future__ import annotations

import json

import pytest

from tests.unit.cli.test_compare import outcomes
from vllm_idlm import zoo
from vllm_idlm.cli import report


def test_sameness_names_the_token_and_the_remedy():
    text = " ".join(report.sameness(*outcomes(), 0.0, None))
    assert "0 of 1" in text
    assert "token 9: plain '<9>', ISD '<10>'" in text
    assert "--dtype float32" in text
    assert "-0.73 and -0.86" in text
    assert "--dtype" not in " ".join(report.sameness(*outcomes(), 0.0, "float32"))
    assert "distribution" in " ".join(report.sameness(*outcomes(), 0.7, None))


def test_verdict_is_plain_about_both_cases():
    plain, isd = outcomes()
    assert report.verdict(plain, isd).endswith(
        "A forward gives 2.00 tokens and takes 1.20 times as long as a plain one."
    )
    assert "ISD was faster here" in report.verdict(plain, isd)
    assert "1.50 times" in report.verdict(plain, isd)
    isd.seconds, isd.decode_seconds = 0.2, 0.19
    assert "NOT faster" in report.verdict(plain, isd)


def test_adapter_line_reads_the_record():
    line = report.adapter_line({"lora": zoo.load("smollm2-135m-risd").lora_path()})
    assert "mask tokens" in line
    assert "minutes" in line
    assert "no adapter" in report.adapter_line({"lora": None})


def test_record_has_its_provenance(tmp_path):
    file = tmp_path / "result.json"
    report.write(file, *outcomes(), {"model": "m"})
    record = json.loads(file.read_text())
    assert record["figures"]["speedup"] == pytest.approx(1.5)
    assert {"command", "commit", "versions", "machine", "time"} <= set(record["provenance"])
    assert record["provenance"]["versions"]["vllm-idlm"]
