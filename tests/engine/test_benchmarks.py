"""The scripts for a bare GPU machine that start engines: a tiny shape, by a plan."""

from __future__ import annotations

import json

import pytest

from tests.support.paths import ROOT
from tests.tools.test_gpu_kit import folder, results, script  # noqa: F401


@pytest.mark.slow
@pytest.mark.vllm
def test_engines_work_and_are_compared(folder):  # noqa: F811
    """Of a tiny shape, without graphs, by a plan: the engines' lines, and the table."""
    words = ["--model", "tiny", "--eager", "--batches", "2", "--rounds", "1", "--tokens", "24", "--kv-gb", "0.1"]
    own = {"GPUKIT_REPO": str(ROOT), "VLLM_LOGGING_LEVEL": "ERROR"}
    import plans

    plan = [plans.engine(method, 300, method, *words, env=own) for method in ("plain", "isd")]
    (folder / "plan.json").write_text(json.dumps(plan))
    said = script("jobs.py", folder / "plan.json", "--seconds", "600")
    engines = [r for r in results(folder) if "rows" in r]
    assert [r["args"]["method"] for r in engines] == ["plain", "isd"]
    assert all(r["rows"][0]["ms_per_forward"] > 0 for r in engines)
    assert "TPF 1.0" in said
    assert "OH " in said
