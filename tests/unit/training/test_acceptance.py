"""The forecast of serving: against a simulation of the chain, and against the paper's formula."""

from __future__ import annotations

import random

import pytest

from vllm_idlm.planner import tpf
from vllm_idlm.training.acceptance import Chain, chain


def constant(rates: list[float], total: int) -> dict[int, list[float]]:
    return {s: rates[: total - 1 - s] for s in range(1, total - 1)}


def simulate(
    rates: dict[int, list[float]], prompt: int, total: int, masks: int, rng: random.Random, covered: bool
) -> tuple[int, int]:
    """Forwards and cold forwards of one run of the chain, drawn draft by draft."""
    place, fresh, forwards, cold = prompt, True, 0, 0
    while place < total - 1:
        forwards += 1
        drafts = min(masks, total - 1 - place) if fresh else 0
        cold += not fresh
        accepted = 0
        while accepted < drafts and rng.random() < rates[place][accepted]:
            accepted += 1
        place, fresh = place + accepted + 1, covered or accepted == drafts
    return forwards, cold


@pytest.mark.parametrize("covered", [False, True])
def test_chain_is_what_a_simulation_of_it_gives(covered):
    rng = random.Random(0)
    rates = {s: [rng.random() for _ in range(min(3, 39 - s))] for s in range(4, 39)}
    want = chain(rates, 4, 40, 3, covered)
    runs = [simulate(rates, 4, 40, 3, rng, covered) for _ in range(20000)]
    assert want.forwards == pytest.approx(sum(r[0] for r in runs) / len(runs), rel=0.01)
    assert want.cold == pytest.approx(sum(r[1] for r in runs) / len(runs), rel=0.02, abs=1e-9)
    assert want.tokens == 35


@pytest.mark.parametrize("masks", [1, 3, 7])
@pytest.mark.parametrize("rate", [0.0, 0.4, 0.9, 1.0])
def test_long_text_at_constant_acceptance_gives_the_papers_formula(masks, rate):
    e = sum(rate**i for i in range(masks + 1))
    want = (e + 1 - rate**masks) / (2 - rate**masks)
    assert tpf([rate] * masks) == pytest.approx(want)
    found = chain(constant([rate] * masks, 20001), 1, 20001, masks)
    assert found.tpf == pytest.approx(want, rel=1e-3)


def test_with_every_outcome_covered_it_is_e():
    assert chain(constant([0.9] * 3, 20001), 1, 20001, 3, True).tpf == pytest.approx(3.439, rel=1e-3)


def test_counts_by_depth_and_their_sum():
    one = chain(constant([1.0, 0.5], 9), 2, 9, 2)
    table = one.table()
    assert table["acceptance"][0] == pytest.approx(1.0)
    assert table["conditional"][1] == pytest.approx(0.5)
    both = one + one + Chain()
    assert both.tokens == 2 * one.tokens
    assert both.tpf == pytest.approx(one.tpf)
    assert both.table()["acceptance"] == pytest.approx(table["acceptance"])
