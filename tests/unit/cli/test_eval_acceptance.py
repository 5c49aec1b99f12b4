"""`idlm eval-acceptance`: what it measures on samples, prints and writes."""

from __future__ import annotations

import pytest


@pytest.mark.heavy
def test_command_prints_and_writes_what_it_measured(tmp_path, smol, adapter):
    import json

    from typer.testing import CliRunner

    from vllm_idlm.cli import app

    rows = [{"prompt_ids": [1, 2, 3], "answer_ids": list(range(40, 60)), "temperature": 0.0}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["eval-acceptance", str(tmp_path / "a.jsonl"), "--model", smol, "--lora", adapter, "--strides", "2,4"]
    ran = CliRunner().invoke(app, [*command, "--temperatures", "0,1", "--to", str(tmp_path / "out")])
    assert ran.exit_code == 0, ran.output
    found = json.loads((tmp_path / "out" / "acceptance.json").read_text())
    assert [row["drawn_at_it"] for row in found["rows"]] == [True, False]
    assert all(1 <= row["strides"]["4"]["tpf"] <= row["covered"]["4"]["tpf"] <= 4 for row in found["rows"])
    assert (tmp_path / "out" / "acceptance.png").stat().st_size > 1000
    bad = CliRunner().invoke(app, [*command[:-1], "1,4"])
    assert bad.exit_code == 2
    assert "--strides 1,4: give numbers from 2 to 16" in " ".join(bad.output.split())
