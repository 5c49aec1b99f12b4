"""Which drafts and groups of mask slots pay: the rule against a simulation, the running estimates, the plan of rows."""

from __future__ import annotations

import random

import numpy as np
import pytest
from vllm_idlm.proposers.coverage import choose, choose_width, expected_tokens, outcomes, settle, worthwhile
from vllm_idlm.proposers.estimates import Acceptance, Cost
from vllm_idlm.proposers.state import MASK, Records, Row, plan_groups

from vllm_idlm import calibrate
from vllm_idlm.tail import places, plan


def simulated(acceptance, groups, cost, requests=1, forwards=200_000, one_width=False) -> float:
    """Tokens a second of a chain of verify and cold forwards, by drawing it; one_width: cold ones have as many rows."""
    draw, k = random.Random(0), len(acceptance)
    rows = 1 + 2 * k + k * len(groups)
    cold = rows if one_width else 1 + k
    tokens = seconds = 0.0
    warm = False
    for _ in range(forwards):
        if not warm:
            tokens, seconds, warm = tokens + 1, seconds + cost(requests * cold, True), True
            continue
        accepted = next((i for i, rate in enumerate(acceptance) if draw.random() >= rate), k)
        tokens += accepted + 1
        seconds += cost(requests * rows, True)
        warm = accepted == k or accepted in groups
    return requests * tokens / seconds


def line(fixed: float, slope: float):
    """A cost that is linear in rows, with a little more for mask slots."""
    return lambda rows, masked: fixed + slope * rows + 0.02 * fixed * masked


def test_outcomes_are_a_distribution():
    chances = outcomes([0.9, 0.5, 0.2])
    assert chances == pytest.approx([0.1, 0.45, 0.36, 0.09])
    assert sum(chances) == pytest.approx(1)
    assert expected_tokens([0.9] * 3) == pytest.approx(3.439)


@pytest.mark.parametrize("acceptance", [[0.54, 0.49, 0.5], [0.9, 0.9, 0.9], [0.3, 0.2, 0.1]])
@pytest.mark.parametrize("slope", [0.0, 0.01, 0.05, 0.2])
def test_the_rate_is_what_a_simulation_yields_and_no_other_choice_beats_it(acceptance, slope):
    cost = line(1.0, slope)
    best = choose(acceptance, cost)
    k = best.stride - 1
    if k:
        assert simulated(acceptance[:k], best.groups, cost) == pytest.approx(best.rate, rel=0.01)
    others = [1 / cost(1, False)]
    for most in range(1, len(acceptance) + 1):
        for bits in range(2**most):
            groups = [j for j in range(most) if bits >> j & 1]
            others.append(simulated(acceptance[:most], groups, cost, forwards=20_000))
    assert max(others) <= best.rate * 1.03


@pytest.mark.parametrize("acceptance", [[0.54, 0.49, 0.5], [0.9, 0.9, 0.9], [0.3, 0.2, 0.1]])
@pytest.mark.parametrize("slope", [0.0, 0.01, 0.05, 0.2])
def test_so_it_is_where_rows_have_one_width(acceptance, slope):
    """Groups behind full rows alone, those behind the fewest accepted drafts first."""
    cost = line(1.0, slope)
    best = choose_width(acceptance, cost)
    k = best.stride - 1
    if k:
        assert simulated(acceptance[:k], best.groups, cost, one_width=True) == pytest.approx(best.rate, rel=0.01)
    allowed = [(k, 0) for k in range(1, len(acceptance))] + [(len(acceptance), count) for count in range(4)]
    others = [1 / cost(1, False)] + [
        simulated(acceptance[:k], range(count), cost, forwards=20_000, one_width=True) for k, count in allowed
    ]
    assert max(others) <= best.rate * 1.03


def test_one_width_carries_what_it_may():
    free = line(1.0, 0.0)
    assert choose_width([0.5] * 3, free)[:2] == (4, (0, 1, 2))
    assert choose_width([0.5] * 3, free, most=1)[:2] == (4, (0,))
    assert choose_width([0.5] * 3, line(0.0, 1.0))[:2] == (1, ())
    assert choose_width([], free)[:2] == (1, ())


def test_free_rows_carry_every_group_and_dear_rows_none():
    assert choose([0.5] * 3, line(1.0, 0.0))[:2] == (4, (0, 1, 2))
    assert choose([0.5] * 3, line(0.0, 1.0))[:2] == (1, ())
    assert choose([0.5] * 3, line(1.0, 0.0), most=0).groups == ()
    assert choose([0.5] * 3, line(1.0, 0.0), most=2).groups == (0, 1)


def test_the_worst_stride_with_groups_is_plain_and_more_requests_carry_less():
    """On a machine whose time is flat up to 64 rows and then linear."""
    found = [choose([0.8] * 3, lambda rows, masked: max(1.0, rows / 64), c) for c in (1, 4, 16, 64, 256)]
    rows = [1 + 2 * (f.stride - 1) + len(f.groups) * (f.stride - 1) for f in found]
    assert rows == sorted(rows, reverse=True)
    assert rows[0] == 16
    assert rows[-1] == 1


def test_a_sure_row_leaves_out_the_groups_it_will_not_need():
    choice = choose([0.6] * 3, line(1.0, 0.004))
    assert set(worthwhile([0.6] * 3, choice)) == set(choice.groups) == {0, 1, 2}
    assert worthwhile([0.995, 0.99, 0.6], choice) == (2,)
    assert worthwhile([0.01, 0.5, 0.5], choice) == (0,)


def test_acceptance_is_learnt_by_place_and_confidence_and_forgotten():
    found, draw = Acceptance(2), random.Random(1)
    for _ in range(4000):
        q = draw.choice([0.3, 0.95])
        found.fade()
        found.observe([q, 0.6], 2 if draw.random() < q else 0)
    assert found.by_place()[0] == pytest.approx(0.62, abs=0.06)
    assert found.of([0.3, 0.6])[0] == pytest.approx(0.3, abs=0.08)
    assert found.of([0.95, 0.6])[0] == pytest.approx(0.95, abs=0.05)
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


@pytest.mark.parametrize("rule", [choose, choose_width])
def test_a_table_that_has_one_kind_too_dear_is_found_out(rule):
    """Drafting twice as dear by the table as it is, then plain decoding: neither is left out for that."""
    truth = {False: lambda rows: 2.0 + 0.01 * rows, True: lambda rows: 2.3 + 0.01 * rows}
    for plain, masked, acceptance, right in ((2.0, 4.0, 0.7, True), (4.0, 2.3, 0.05, False)):
        cost = Cost([1, 16], [plain, plain + 0.15], [masked, masked + 0.15])
        assert (rule([acceptance], cost, 1).stride > 1) != right, "the table is not wrong"
        taken = []
        for _ in range(60):
            best = settle(rule, [acceptance], cost, 1)
            masked_now = best.stride > 1
            taken.append(masked_now)
            rows = 3 + len(best.groups) if masked_now else 1
            for _ in range(8):
                cost.observe(rows, masked_now, truth[masked_now](rows))
        assert taken[3:].count(not right) <= 1


@pytest.mark.parametrize("rule", [choose, choose_width])
def test_what_is_hopeless_is_not_tried(rule):
    dear = Cost([1, 16], [1.0, 1.1], [4.0, 9.0])
    assert settle(rule, [0.9], dear, 1).stride == 1
    assert settle(rule, [], dear, 1).stride == 1
    slow = Cost([1, 16], [9.0, 9.0], [1.0, 1.1])
    assert settle(rule, [0.9], slow, 1).stride == 2


def test_a_kind_that_lost_is_tried_once_in_a_thousand_steps():
    truth = {False: lambda rows: 1.0 + 0.05 * rows, True: lambda rows: 1.0 + 0.2 * rows}
    cost = Cost([1, 16], [1.05, 1.8], [1.2, 4.2])
    tried = 0
    for _ in range(500):
        best = settle(choose, [0.4], cost, 1)
        masked = best.stride > 1
        tried += masked
        rows = 3 + len(best.groups) if masked else 1
        for _ in range(8):
            cost.observe(rows, masked, truth[masked](rows))
    assert 2 <= tried <= 5


def test_a_busy_moment_is_taken_off_the_tables():
    made = calibrate._tables({
        (1, False): 9.0, (1, True): 3.0, (4, False): 2.5, (4, True): 8.0, (7, False): 3.0, (7, True): 4.0,
    })  # fmt: skip
    assert made == ([1, 4, 7], [2.5, 2.5, 3.0], [3.0, 4.0, 4.0])
    assert calibrate._tables({(1, False): 1.0, (4, False): 2.0}) == ([1, 4], [1.0, 2.0], [1.0, 2.0])


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


# -- rows


def test_groups_are_planned_for_what_remains():
    assert plan_groups(3, 3, 100, (0, 1, 2)) == ((0, 3), (1, 3), (2, 3))
    assert plan_groups(2, 3, 100, (2, 0, 1)) == ((0, 3), (1, 3))  # 2 accepted of 2: the row's own masks
    assert plan_groups(3, 3, 5, (0, 1, 2)) == ((0, 3), (1, 2), (2, 1))
    assert plan_groups(3, 3, 2, (0, 1, 2)) == ()


def test_a_row_finds_the_masks_behind_what_was_accepted():
    row = Row([5, 6, 7], 3, None, ((1, 3), (0, 2)))
    assert [row.group(j) for j in range(4)] == [(6, 2), (3, 3), (0, 0), (0, 3)]
    assert (row.all_masks, row.width) == (8, 11)


@pytest.mark.parametrize(
    ("kept", "masks", "extra"),
    [(11, 3, ((1, 3), (0, 2))), (10, 3, ((1, 3), (0, 1))), (8, 3, ((1, 2),)), (6, 3, ()), (4, 1, ()), (3, 0, ())],
)
def test_a_row_cut_short_loses_its_last_groups_first(kept, masks, extra):
    records = Records()
    slots = records.hand_over("a", Row([5, 6, 7], 3, None, ((1, 3), (0, 2))))
    assert slots == [5, 6, 7] + [MASK] * 8
    row = records.take("a", slots[:kept])
    assert (list(row.drafts), row.masks, row.extra) == ([5, 6, 7], masks, extra)


def test_places_of_extra_rows():
    """x d1 d2 M M | G0: M M | G1: M: two requests, at rows 0 and 20 of the step, with 100 and 7 tokens in the cache."""
    row, position, visible, first = places(5, ((0, 2), (1, 1)))
    assert row.tolist() == [5, 6, 7]
    assert position.tolist() == [1, 2, 2]
    assert visible.tolist() == [1, 1, 2]
    assert first.tolist() == [5, 5, 7]
    rows = [Row([1, 2], 2, None, ((0, 2), (1, 1))), Row([1], 2), Row([1, 2], 2, None, ((1, 2),))]
    found = plan(rows, np.array([0, 8, 20]), np.array([100, 50, 7]))
    assert found.requests.tolist() == [0, 2]
    assert found.starts.tolist() == [0, 3, 5]
    assert found.fields.tolist() == [
        [5, 6, 7, 25, 26],
        [101, 101, 102, 9, 9],
        [105, 105, 107, 12, 12],
        [106, 107, 108, 13, 14],
    ]
    assert found.positions.tolist() == [101, 102, 102, 9, 10]
    assert plan(rows[1:2], np.array([0]), np.array([50])) is None
