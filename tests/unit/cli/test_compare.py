"""Two outcomes compared: figures, and the first token that differs."""

from __future__ import annotations

import pytest

from vllm_idlm.cli import compare
from vllm_idlm.cli._run import Outcome


def answer(ids, text=""):
    return {"text": text, "token_ids": ids, "pieces": [f"<{t}>" for t in ids]}


def outcomes():
    """Plain: 9 tokens in 8 decode steps of 10 ms. ISD: the last token differs; 4 forwards of 12 ms."""
    plain = Outcome([answer([1, 2, 3, 4, 5, 6, 7, 8, 9])], 0.09, 0.08, 8, 8)
    counts = {"accepted_all": 2, "rejected": 1, "cold": 1, "forwards": 4}
    places = {"drafted_per_position": [3, 3, 3], "accepted_per_position": [3, 2, 2]}
    isd = Outcome(
        [answer([1, 2, 3, 4, 5, 6, 7, 8, 10])],
        0.06,
        0.048,
        8,
        4,
        isd={**counts, **places},
        margins={"0": [-0.73, -0.86]},
    )
    return plain, isd


def test_figures():
    plain, isd = outcomes()
    assert compare.tpf(plain) == 1
    assert compare.tpf(isd) == 2
    assert compare.overhead(plain, isd) == pytest.approx(1.2)
    assert compare.speed(isd) / compare.speed(plain) == pytest.approx(1.5)
    assert compare.acceptance(isd.isd) == pytest.approx([1, 2 / 3, 1])


@pytest.mark.parametrize(
    ("isd", "expected"),
    [([1, 2, 3], None), ([1, 5, 3], (1, "<2>", "<5>")), ([1, 2], (2, "<3>", None)), ([1, 2, 3, 4], (3, None, "<4>"))],
    ids=["same", "in-the-middle", "shorter", "longer"],
)
def test_first_difference(isd, expected):
    found = compare.first_difference(0, answer([1, 2, 3]), answer(isd))
    assert (None if found is None else (found.index, found.plain, found.isd)) == expected
