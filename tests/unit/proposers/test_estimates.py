"""The running estimates: acceptance by place and confidence, and what steps cost."""

from __future__ import annotations

import random

import numpy as np
import pytest
from vllm_idlm.proposers.coverage import choose
from vllm_idlm.proposers.estimates import Acceptance, Cost


def test_acceptance_is_learnt_by_place_and_confidence_and_forgotten():
    found, draw = Acceptance(2), random.Random(1)
    for _ in range(4000):
        q = draw.choice([0.3, 0.95])
        found.fade()
        found.observe([q, 0.6], 2 if draw.random() < q else 0)
    assert found.by_place()[0] == pytest.approx(0.62, abs=0.06)
    assert found.of([0.3, 0.6])[0] == pytest.approx(0.3, abs=0.08)
    assert found.of([0.95, 0.6])[0] == pytest.approx(0.95, abs=0.05)
    assert found.of([0.95, 0.6])[1] > 0.97
    assert found.by_place()[1] > 0.97  # counted only where the first was accepted
    for _ in range(5000):
        found.fade()
    assert found.by_place() == pytest.approx([0.6, 0.6], abs=0.01)


def test_counts_of_a_batch_are_those_of_its_rows():
    """A draft behind the first rejected one says nothing; a row without drafts neither."""
    one, all_at_once = (Acceptance(3, keep=1.0) for _ in range(2))
    rows = [(3, 3), (3, 0), (2, 1), (0, 0), (1, 1), (3, 2)]
    for drafts, accepted in rows:
        one.observe([0.05] * drafts, accepted)
    all_at_once.count(*np.array(rows).T)
    assert all_at_once.by_place() == one.by_place()
    assert all_at_once._counts[0, 0].tolist() == [4, 5]


def test_cost_follows_the_table_and_then_the_steps():
    cost = Cost([1, 4, 16], [1.0, 1.1, 1.5], [1.2, 1.3, 1.7])
    assert cost(4, False) == pytest.approx(1.1)
    assert cost(10, True) == pytest.approx(1.5)
    assert cost(40, False) == pytest.approx(1.5 + 24 * 0.4 / 12)
    draw = np.random.default_rng(0)
    for rows in draw.choice([4, 7, 16], 400):
        cost.observe(int(rows), True, cost.table(int(rows), True) + 0.5 + 0.02 * rows + draw.normal(0, 0.01))
    assert cost(7, True) == pytest.approx(cost.table(7, True) + 0.64, abs=0.03)
    assert cost(16, True) == pytest.approx(1.7 + 0.82, abs=0.06)  # the slope is held back a little
    cost.observe(7, True, 60.0)  # a pause
    assert cost(7, True) == pytest.approx(cost.table(7, True) + 0.64, abs=0.03)


def test_a_first_step_that_compiles_something_is_left_out():
    cost = Cost([1, 8], [0.011, 0.011], [0.012, 0.012])
    cost.observe(16, True, 3.0)
    for _ in range(3):
        cost.observe(16, True, 0.013)
    assert cost(16, True) == pytest.approx(0.013, rel=0.05)


def test_steps_that_stay_slow_are_no_pause():
    """A few slow steps are left out; when they go on they are what steps take, though the table never said so."""
    cost = Cost([1, 8], [0.010, 0.010], [0.012, 0.012])
    for _ in range(30):
        cost.observe(16, True, 0.012)
    for _ in range(4):
        cost.observe(16, True, 0.5)
    assert cost(16, True) == pytest.approx(0.012, rel=0.05)
    for _ in range(30):
        cost.observe(16, True, 0.05)
    assert cost(16, True) == pytest.approx(0.05, rel=0.1)
    unknown = Cost([1], [0.04], [0.04])
    for _ in range(30):
        unknown.observe(1, False, 0.5)
    assert unknown(1, False) == pytest.approx(0.5, rel=0.1)


def test_a_table_that_was_too_dear_keeps_nothing_from_being_tried():
    """Steps with masks are twice as fast as the table said: plain steps, never run, are taken to be too."""
    cost = Cost([1, 8], [0.010, 0.010], [0.012, 0.012])
    assert cost(1, False) == pytest.approx(0.010)
    for _ in range(50):
        cost.observe(16, True, 0.006)
    assert cost(1, False) == pytest.approx(0.005, rel=0.1)
    for _ in range(50):
        cost.observe(1, False, 0.007)
    assert cost(1, False) == pytest.approx(0.007, rel=0.05)
    slower = Cost([1, 8], [0.010, 0.010], [0.012, 0.012])
    for _ in range(30):
        slower.observe(16, True, 0.02)
    assert slower(1, False) == pytest.approx(0.010)


def test_one_size_of_rows_says_nothing_of_the_slope():
    cost = Cost([1, 16], [1.0, 1.0], [1.0, 1.0])
    for _ in range(100):
        cost.observe(7, True, 1.5)
    assert cost(7, True) == pytest.approx(1.5, abs=0.01)
    assert cost(16, True) == pytest.approx(1.5, abs=0.01)


def test_steps_with_masks_say_nothing_of_steps_without():
    """The table is too good for both; whichever is run is found out, and the choice settles on what is truly faster."""
    truth = {False: lambda rows: 2.0 + 0.01 * rows, True: lambda rows: 3.5 + 0.03 * rows}
    cost = Cost([1, 16], [1.0, 1.1], [1.0, 1.1])
    taken = []
    for _ in range(50):
        best = choose([0.5], cost, requests=4)
        masked = best.stride > 1
        rows = 4 * (3 + len(best.groups)) if masked else 4
        taken.append(masked)
        for _ in range(8):
            cost.observe(rows, masked, truth[masked](rows))
    assert taken[0], "drafting was not tried"
    assert sum(taken) <= 2, "what was measured with masks was held against decoding without"
    for _ in range(8000):
        cost.observe(4, False, truth[False](4))
    assert choose([0.5], cost, requests=4).stride == 2, "drafting is never tried again"


def test_a_machine_that_slows_down_slows_both_kinds():
    """Plain decoding gets dearer by 60% and cheaper again; drafting, which does too, is not tried for that.

    Without the factor it is tried seven times here; once or twice it is because what is known of it fades.
    """
    truth = {False: lambda rows: 2.0 + 0.01 * rows, True: lambda rows: 2.9 + 0.03 * rows}
    cost = Cost([1, 16], [1.0, 1.1], [1.0, 1.1])
    draw, tried = np.random.default_rng(0), 0
    for step in range(1200):
        best = choose([0.5], cost, requests=4)
        masked = best.stride > 1
        tried += masked and step > 100
        rows = 4 * (3 + len(best.groups)) if masked else 4
        speed = 1.6 if 300 < step < 700 else 1.0
        cost.observe(rows, masked, speed * truth[masked](rows) * draw.normal(1, 0.03))
    assert tried <= 2
    assert cost(12, True) == pytest.approx(truth[True](12), rel=0.2)
