"""ISD's counts: a batch at once counts what one request after another does."""

from __future__ import annotations

import random

import numpy as np
from vllm_idlm.proposers.state import Row

from vllm_idlm.v1.stats import ISDStats


def test_a_batch_counts_as_its_requests_do():
    rng = random.Random(0)
    one, many = ISDStats(), ISDStats()
    for _ in range(20):
        drafts = [rng.randint(0, 4) for _ in range(rng.randint(0, 6))]
        emitted = [rng.randint(1, k + 1) for k in drafts]
        for k, e in zip(drafts, emitted, strict=True):
            one.observe("r", Row([7] * k, 3), [5] * e)
        many.observe_batch(np.array(drafts, dtype=np.int32), np.array(emitted, dtype=np.int64))
    assert one.as_dict() == many.as_dict()
    assert one.as_dict()["forwards"] > 20
