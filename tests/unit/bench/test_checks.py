"""The checks of a comparison's counts: they hold where counts agree, and find one that is off."""

from __future__ import annotations

import pytest

from tests.support.rounds import isd_round
from vllm_idlm import planner
from vllm_idlm.bench import checks, config


def test_checks_hold_where_counts_agree():
    found = checks.of(config.Method(name="isd", speculative={"method": "isd"}), [isd_round()])
    assert [check.ok for check in found] == [True] * 5 + [None]


@pytest.mark.parametrize(
    ("where", "name", "failing"),
    [
        ("vllm", "tokens", "tokens in the answers"),
        ("vllm", "forwards", "forwards seen"),
        ("vllm", "verify_forwards", "verify forwards"),
        ("vllm", "accepted", "TPF x forwards"),
        ("isd", "emitted", "TPF x forwards"),
        ("isd", "cold", "ISD's forwards"),
    ],
)
def test_a_wrong_count_is_found(where, name, failing):
    one = isd_round()
    one[where][name] += 1
    bad = [c.name for c in checks.of(config.Method(name="isd", speculative={"method": "isd"}), [one]) if c.ok is False]
    assert any(failing in name for name in bad)


@pytest.mark.parametrize(("off", "ok"), [(1.0, True), (1.03, False)])
def test_the_formula_is_held_against_the_tpf(off, ok):
    given, method = [0.6, 0.5], config.Method(name="x", speculative={"method": "isd", "n": 3, "coverage": "last"})
    found = {"TPF": planner.tpf(given) * off, "given_before": given, "forwards": 1000}
    assert checks._formula(method, found).ok is ok
    assert checks._formula(method, {**found, "forwards": 10}).ok is None
