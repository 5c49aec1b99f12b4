"""The plan of rows: groups for what remains, and rows that are cut short."""

from __future__ import annotations

import pytest
from vllm_idlm.proposers.state import MASK, Records, Row, plan_groups


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
