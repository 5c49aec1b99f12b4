"""ISD's counts: a batch at once counts what one forward after another does."""

from __future__ import annotations

import random

import numpy as np
from vllm_idlm.proposers.state import Row

from vllm_idlm.v1.stats import ISDStats


def test_a_batch_counts_as_its_requests_do():
    """Against a count forward by forward; the empty batch counts nothing."""
    rng = random.Random(0)
    found, want = ISDStats(), ISDStats(drafted_per_position=[0] * 4, accepted_per_position=[0] * 4)
    for _ in range(20):
        batch = []
        for _ in range(rng.randint(0, 6)):
            k = rng.randint(0, 4)
            e = rng.randint(1, k + 1)
            batch.append(("r", Row([7] * k, 3), [5] * e))
            want.cold += k == 0
            want.accepted_all += k > 0 and e == k + 1
            want.rejected += k > 0 and e < k + 1
            want.emitted += e
            want.rows += 1 + k + 3
            for place in range(k):
                want.drafted_per_position[place] += 1
                want.accepted_per_position[place] += place < e - 1
        found.observe(batch)
    assert found.as_dict() == want.as_dict()
    assert found.as_dict()["forwards"] > 20
    assert found.as_dict()["rows_per_token"] == found.rows / found.emitted


def test_it_is_counted_as_forwards_without_drafts():
    whole, bare = ISDStats(), ISDStats()
    whole.count(np.zeros(3, dtype=np.int64), np.ones(3, dtype=np.int64), 3)
    bare.count_bare(3)
    assert bare.as_dict() == whole.as_dict()
