"""The figures of a comparison, on made-up rounds that were counted by hand."""

from __future__ import annotations

import pytest

from tests.support.rounds import isd_round, plain_round
from vllm_idlm.bench import figures


def test_figures_of_plain_decoding():
    one = plain_round()
    found = figures.of([one], [one])
    assert found["TPF"] == found["rows"] == found["efficiency"] == 1
    assert found["tokens_per_s"]["median"] == pytest.approx(22 / 1.5)
    assert found["speedup"]["median"] == found["OH"]["median"] == 1
    assert found["itl_ms"]["p50"] == pytest.approx(100)
    assert found["ttft_ms"]["p99"] == pytest.approx(500)
    assert found["tokens_per_s_request"] == pytest.approx(10)
    assert (found["identical"], found["compared"], found["acceptance"], found["alpha"]) == (2, 2, [], None)


def test_figures_of_isd_counted_by_hand():
    found = figures.of([isd_round()], [plain_round()])
    assert found["TPF"] == 1.6
    assert found["OH"]["median"] == pytest.approx(2)
    assert found["rows"] == 4.2
    assert found["efficiency"] == pytest.approx(1.6**2 / 4.2)
    assert found["kinds"] == {"verify": 6, "cold": 4, "accepted_all": 2, "rejected": 4}
    assert found["accepted_length"] == 2
    assert found["acceptance"] == pytest.approx([4 / 6, 2 / 6])
    assert found["given_before"] == pytest.approx([4 / 6, 2 / 4])
    assert found["alpha"] == pytest.approx(6 / 10)
    assert found["identical"] == 0


def test_ratios_are_of_the_same_round():
    """A machine that is twice as slow in one round moves no ratio."""
    slow = [plain_round(step=0.1), plain_round(step=0.2)]
    found = figures.of([isd_round(step=0.2), isd_round(step=0.4)], slow)
    assert found["OH"] == pytest.approx({"median": 2, "min": 2, "max": 2})
    assert figures.of([isd_round()], [None])["OH"] is None


def test_percentiles():
    assert figures.percentiles(list(range(101))) == {"p50": 50, "p99": 99}
    assert figures.percentiles([]) is None
