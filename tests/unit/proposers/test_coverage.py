"""Which drafts and groups of mask slots pay: the rule against a simulation."""

from __future__ import annotations

import random

import pytest
from vllm_idlm.proposers.coverage import choose, choose_width, expected_tokens, outcomes, settle, width, worthwhile
from vllm_idlm.proposers.estimates import Cost


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


def test_the_choice_keeps_to_widths_that_are_there():
    def cost(rows, masked):
        return 1.0 + rows / 100

    for acceptance in ([0.9, 0.9, 0.9], [0.9, 0.1, 0.1], [0.5, 0.5, 0.5], [0.01, 0.01, 0.01]):
        free = choose_width(acceptance, cost)
        bound = choose_width(acceptance, cost, widths={0, 2, 6, 15})
        assert width(bound.stride, len(bound.groups)) in {0, 2, 6, 15}
        assert bound.rate <= free.rate
        assert bound == free or width(free.stride, len(free.groups)) not in {0, 2, 6, 15}


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
