"""The stream of batches: blocks are those of the whole batch on any number of devices."""

from __future__ import annotations

import torch

from tests.support.training import several
from vllm_idlm.training import start


def test_blocks_are_those_of_the_whole_batch_on_any_number_of_devices(world):
    """Two streams of two rows hold, row by row, what one stream of four rows holds."""
    from vllm_idlm.training.stream import Stream

    made = several(world, "gated")
    train, _ = start.samples(made, None)
    whole = next(Stream(train, made.model_copy(update={"rows": 4})).steps(6))
    halves = [next(Stream(train, made, rank, 2).steps(6)) for rank in range(2)]
    for forward in range(made.accumulate):
        for row in range(4):
            own = halves[row // 2][forward]
            for field, within in (("tokens", "sample"), ("start", "start"), ("place", "start")):
                got, want = (
                    getattr(batch, field)[r][getattr(batch, within)[r] >= 0]
                    for batch, r in ((own, row % 2), (whole[forward], row))
                )
                assert torch.equal(got, want)
