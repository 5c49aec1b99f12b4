"""The layout of training: where blocks of masks start."""

from __future__ import annotations

import itertools
import random

from vllm_idlm.training.layout import block_starts


def test_blocks_start_where_a_forward_has_its_first_masks_and_tile_the_answer():
    starts = block_starts(prompt=5, total=20, block=3, tilings=1, rng=random.Random(0))
    assert set(starts) <= set(range(5, 19))
    assert {b - a for a, b in itertools.pairwise(starts)} == {3}
    assert block_starts(5, 20, 3, 3, random.Random(0)) == list(range(5, 19))
    assert {tuple(block_starts(5, 20, 3, 1, random.Random(i))) for i in range(20)} == {
        tuple(range(5 + o, 19, 3)) for o in range(3)
    }


def test_every_answer_of_two_tokens_has_a_mask_at_any_offset():
    for answer in range(2, 9):
        for seed in range(20):
            assert block_starts(5, 5 + answer, 4, 1, random.Random(seed))
