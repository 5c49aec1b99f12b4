"""The client of `idlm eval`: ISD's counters on a server's metrics page."""

from __future__ import annotations

from vllm_idlm.evaluate.client import isd_counters


def test_counters_of_the_metrics_page():
    lines = [
        'isd:forwards_total{kind="verify"} 5.0',
        'isd:forwards_total{kind="cold"} 2.0',
        "isd:tokens_total{} 9",
        "x 1",
    ]
    assert isd_counters(lines) == {"forwards": 7.0, "tokens": 9.0}
