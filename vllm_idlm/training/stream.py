"""Which samples a step trains on: a pure function of seed and step, so that a resumed run sees the same data."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from vllm_idlm.training.config import Config
from vllm_idlm.training.layout import Batch, Sample, lay_out, pack


class Stream:
    """Packed rows, epoch after epoch, shared out over the devices."""

    def __init__(self, samples: Sequence[Sample], config: Config, rank: int = 0, world: int = 1) -> None:
        self.samples = samples
        self.config = config
        self.rank, self.world = rank, world

    def _rows(self) -> Iterator[list[Sample]]:
        epoch = 0
        while True:
            order = list(range(len(self.samples)))
            random.Random(f"{self.config.seed}-epoch-{epoch}").shuffle(order)
            lengths = [len(self.samples[i]) for i in order]
            for row in pack(lengths, self.config.row_tokens):
                yield [self.samples[order[i]] for i in row]
            epoch += 1

    def steps(self, first: int) -> Iterator[list[Batch]]:
        """The batches (one a forward) of steps `first`, `first` + 1, .. of this device."""
        config, rows = self.config, self._rows()
        each = config.rows * self.world
        for step in range(config.steps):
            taken = [[next(rows) for _ in range(each)] for _ in range(config.accumulate)]
            if step >= first:
                mine = range(self.rank * config.rows, (self.rank + 1) * config.rows)
                yield [self._batch(step, i, group, mine) for i, group in enumerate(taken)]

    def _batch(self, step: int, forward: int, rows: list[list[Sample]], mine: range) -> Batch:
        block = self.config.stride_at(step) - 1
        # one generator a row of the whole batch: the blocks are the same on any number of devices
        dice = [random.Random(f"{self.config.seed}-blocks-{step}-{forward}-{row}") for row in mine]
        return lay_out([rows[row] for row in mine], block, min(self.config.tilings, block), dice)
