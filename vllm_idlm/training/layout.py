"""The layout of a training row: packed samples, and the mask blocks laid behind their prefixes.

A block that starts at place s stands for the serving forward `[.., x, M1..MB]` whose pending token x is at s - 1: its
masks take the places s .. s+B-1, see the clean tokens of their own sample before s and the masks of their own block up
to themselves, and nothing else. By the logit shift the hidden state at place i, clean or mask, predicts token i + 1, so
the clean place s+j is the anchor p of the block's mask j. Source: arXiv 2604.11035, training; gated form: ours.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

PADDING = -1
OPEN_ROWS = 32  # rows that packing still tries to fill


@dataclass(frozen=True)
class Sample:
    """A prompt and its answer as token ids; the masks lie over the answer."""

    prompt: Sequence[int]
    answer: Sequence[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Batch:
    """Packed rows and their mask blocks; L clean places and M masks a row, padded. All int64 on one device."""

    tokens: torch.Tensor  # [rows, L] clean token ids, 0 in padding
    positions: torch.Tensor  # [rows, L] place within the own sample: the rotary position
    sample: torch.Tensor  # [rows, L] number of the sample within the row, PADDING behind the last
    start: torch.Tensor  # [rows, M] place in the row where the mask's block starts; a number below 0 is padding
    place: torch.Tensor  # [rows, M] the mask's own place in the row

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def widened(self, length: int, masks: int) -> Batch:
        """The same batch with padding up to `length` clean places and `masks` masks (at least as many as it has)."""
        rows, device = self.tokens.shape[0], self.tokens.device

        def wide(values: torch.Tensor, width: int, fill: int | None) -> torch.Tensor:
            extra = width - values.shape[1]
            if fill is None:  # masks of padding are different from each other and from those that are there
                padding = -2 - values.shape[1] - torch.arange(extra, device=device).expand(rows, extra)
            else:
                padding = values.new_full((rows, extra), fill)
            return torch.cat([values, padding], 1)

        return Batch(
            wide(self.tokens, length, 0),
            wide(self.positions, length, 0),
            wide(self.sample, length, PADDING),
            wide(self.start, masks, None),
            wide(self.place, masks, None),
        )

    @property
    def real(self) -> torch.Tensor:
        """[rows, M] bool: masks that are no padding."""
        return self.start >= 0

    @property
    def depth(self) -> torch.Tensor:
        """[rows, M] index of a mask within its block, from 0."""
        return self.place - self.start

    def at_masks(self, clean: torch.Tensor) -> torch.Tensor:
        """Entries of `clean` [rows, L, ...] at the masks' places: [rows, M, ...] (0 for padding)."""
        index = self.place.clamp(min=0).reshape(*self.place.shape, *[1] * (clean.dim() - 2))
        return clean.gather(1, index.expand(*self.place.shape, *clean.shape[2:]))

    def mask_positions(self) -> torch.Tensor:
        """[rows, M] rotary positions of the masks: their places within their samples."""
        return self.at_masks(self.positions)

    def targets(self) -> torch.Tensor:
        """[rows, M] the token that each mask is to predict: the one behind its place."""
        return self.tokens.gather(1, (self.place + 1).clamp(min=0))

    def clean_targets(self) -> torch.Tensor:
        """[rows, L] the token behind each clean place, PADDING where its sample ends."""
        following, same = self.tokens.roll(-1, 1), self.sample.roll(-1, 1) == self.sample
        same[:, -1] = False
        return torch.where(same & (self.sample >= 0), following, PADDING)


def visible(batch: Batch, clean_queries: bool, mask_queries: bool):
    """Who sees whom, as a predicate (row, query, key) -> bool over tensors of indices.

    Queries are the clean places, the masks, or both in this order; keys are the clean places, then the masks if there
    are mask queries. Dense masks and FlexAttention's block mask are made of it.
    """
    length, masks = batch.tokens.shape[1], batch.start.shape[1]
    first = length if clean_queries else 0  # queries before it are clean
    sample_of_mask = torch.where(batch.real, batch.at_masks(batch.sample), PADDING - 1)

    def predicate(row: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        q, k = query.clamp(max=length - 1), key.clamp(max=length - 1)
        clean_clean = (key <= query) & (batch.sample[row, q] == batch.sample[row, k])
        if not mask_queries:
            return clean_clean
        m = (query - first).clamp(min=0, max=masks - 1)
        other = (key - length).clamp(min=0, max=masks - 1)
        mask_clean = (key < batch.start[row, m]) & (batch.sample[row, k] == sample_of_mask[row, m])
        mask_mask = (batch.start[row, other] == batch.start[row, m]) & (batch.place[row, other] <= batch.place[row, m])
        of_mask = torch.where(key < length, mask_clean, mask_mask)
        return torch.where(query < first, clean_clean & (key < length), of_mask)

    return predicate


def block_starts(prompt: int, total: int, block: int, tilings: int, rng: random.Random) -> list[int]:
    """Starts of blocks over an answer that begins at `prompt` and ends before `total`, sorted.

    A tiling is one block after another from a random offset. `tilings` different ones are laid over each other: 1 is
    the paper's layout, `block` lets a block start at every place. The first start is `prompt`: the prompt's own
    forward has the first masks. Each start has a token to predict (start + 1 < total).
    """
    room = min(block, total - 1 - prompt)  # offsets that leave at least one mask
    offsets = rng.sample(range(room), min(tilings, room)) if room > 0 else []
    return sorted(s for o in offsets for s in range(prompt + o, total - 1, block))


def pack(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Indices of samples, grouped into rows of at most `row_tokens`: first fit among the last rows, in their order."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index, length in enumerate(lengths):
        open_rows = range(max(0, len(rows) - OPEN_ROWS), len(rows))
        found = next((r for r in open_rows if room[r] >= length), None)
        if found is None:
            rows.append([])
            room.append(row_tokens)
            found = len(rows) - 1
        rows[found].append(index)
        room[found] -= length
    return rows


def lay_out(
    rows: Sequence[Sequence[Sample]], block: int, tilings: int, rng: random.Random | Sequence[random.Random]
) -> Batch:
    """The batch of the given rows of samples, with random blocks of `block` masks; rng: for all rows, or one a row."""
    dice = [rng] * len(rows) if isinstance(rng, random.Random) else rng
    made = [_lay_row(row, block, tilings, one) for row, one in zip(rows, dice, strict=True)]
    padding = {"tokens": 0, "positions": 0, "sample": PADDING}
    columns = {name: _padded([row[name] for row in made], value) for name, value in padding.items()}
    start = _padded([row["start"] for row in made], None)
    place = _padded([row["place"] for row in made], None)
    return Batch(**columns, start=start, place=place)


def _lay_row(samples: Sequence[Sample], block: int, tilings: int, rng: random.Random) -> dict[str, list[int]]:
    row: dict[str, list[int]] = {"tokens": [], "positions": [], "sample": [], "start": [], "place": []}
    for number, sample in enumerate(samples):
        first, total = len(row["tokens"]), len(sample)
        row["tokens"] += [*sample.prompt, *sample.answer]
        row["positions"] += range(total)
        row["sample"] += [number] * total
        for start in block_starts(len(sample.prompt), total, block, tilings, rng):
            places = range(start, min(start + block, total - 1))  # a place must have a token behind it
            row["start"] += [first + start] * len(places)
            row["place"] += [first + place for place in places]
    return row


def _padded(rows: list[list[int]], value: int | None) -> torch.Tensor:
    """[rows, longest] int64; padding is `value`, or -2, -3, ..: masks that see themselves only (no row is empty)."""
    width = max(1, *map(len, rows))
    return torch.tensor(
        [row + [value if value is not None else -2 - i for i in range(width - len(row))] for row in rows]
    )
