"""The statistics of `idlm eval`: at known values, and by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_idlm.evaluate import statistics


def test_mcnemar_and_the_interval_at_known_values():
    reference = [[True]] * 6 + [[False]] * 14
    other = [[False]] * 5 + [[True]] + [[False]] * 13 + [[True]]
    found = statistics.paired(reference, other)
    assert (found.lost, found.won) == (5, 1)
    assert found.p == pytest.approx(0.21875)  # 2 (C(6,0) + C(6,1)) / 2^6
    assert found.difference == pytest.approx(-0.2)
    assert found.low < -0.2 < found.high < 0.05


def test_nothing_unlike_leaves_the_bound_of_n_pairs():
    found = statistics.paired([[True]] * 59, [[True]] * 59)
    assert (found.p, found.difference) == (1.0, 0.0)
    assert found.high == pytest.approx(0.05, abs=0.001)  # 59 alike pairs rule out 5% unlike ones at 95%


@pytest.mark.heavy
def test_the_test_keeps_its_level_and_finds_a_loss():
    """200 comparisons of equals: no more than the stated share is rejected; a loss of 15 points nearly always is."""
    rng = np.random.default_rng(0)
    chance = rng.uniform(0.1, 0.9, 150)

    def draw(shift):
        return [[bool(x) for x in rng.random(2) < c - shift] for c in chance]

    equal = [statistics.paired(draw(0), draw(0)).p for _ in range(200)]
    worse = [statistics.paired(draw(0), draw(0.15)) for _ in range(40)]
    assert np.mean(np.array(equal) < 0.05) < 0.08
    assert np.mean([w.high < 0 for w in worse]) > 0.9
    assert np.mean([w.p < 0.05 for w in worse]) > 0.9


def test_wilson():
    assert statistics.interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-3)
