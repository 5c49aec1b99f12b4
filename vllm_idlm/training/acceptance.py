"""What drafting quality gives in serving: acceptance of each draft, and the tokens per forward that follow from it.

Given a text that was drawn from p, the draft at a place is accepted with probability min(1, q(v)/p(v)) if the text says
v there (of all ways to emit v the share that comes from an accepted draft is min(p, q)/p; at temperature 0: whether the
likeliest tokens agree). The chain of verify and cold forwards over that text is then a Markov chain, and the expected
number of forwards follows exactly, place by place, instead of from one mean acceptance.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from vllm_idlm.training import forward
from vllm_idlm.training.layout import Batch, Sample, lay_out
from vllm_idlm.training.losses import CHUNK_BYTES


@dataclass
class Chain:
    """Expected counts of serving one or several texts at one stride."""

    tokens: float = 0.0  # emitted after the prompt's forward
    forwards: float = 0.0
    cold: float = 0.0  # forwards without drafts, among them
    drafted: list[float] = field(default_factory=list)  # by depth: drafts that stood in verify forwards
    reached: list[float] = field(default_factory=list)  # by depth: drafts with all before them accepted
    accepted: list[float] = field(default_factory=list)  # by depth

    def __add__(self, other: Chain) -> Chain:
        def both(a: list[float], b: list[float]) -> list[float]:
            return [x + y for x, y in zip(a or [0.0] * len(b), b or [0.0] * len(a), strict=True)]

        return Chain(
            self.tokens + other.tokens,
            self.forwards + other.forwards,
            self.cold + other.cold,
            both(self.drafted, other.drafted),
            both(self.reached, other.reached),
            both(self.accepted, other.accepted),
        )

    @property
    def tpf(self) -> float:
        """Tokens per forward."""
        return self.tokens / max(self.forwards, 1e-9)

    def table(self) -> dict[str, Any]:
        """TPF, share of cold forwards, acceptance by depth: of all drafts there, and of those reached."""
        return {
            "tpf": self.tpf,
            "cold": self.cold / max(self.forwards, 1e-9),
            "acceptance": [a / max(d, 1e-9) for a, d in zip(self.accepted, self.drafted, strict=True)],
            "conditional": [a / max(r, 1e-9) for a, r in zip(self.accepted, self.reached, strict=True)],
        }


def chain(rates: dict[int, Sequence[float]], prompt: int, total: int, masks: int, covered: bool = False) -> Chain:
    """Serve one text of `total` tokens behind a prompt of `prompt`, `masks` mask slots a forward.

    covered: with masks behind every accepted prefix (`coverage` "all"), so that a rejection makes no forward cold.

    rates[s][j]: acceptance of the draft at depth j (for place s+1+j) of the block that starts at s, given the text.
    The pending token at s is verified with that block's drafts, the first one with those of the prompt's forward.
    """
    verify, cold = [0.0] * (total + 1), [0.0] * (total + 1)  # expected visits with the pending token at a place
    verify[prompt] = 1.0
    found = Chain(float(total - 1 - prompt), drafted=[0.0] * masks, reached=[0.0] * masks, accepted=[0.0] * masks)
    for s in range(prompt, total - 1):  # the last token needs no forward behind it
        found.forwards += cold[s] + verify[s]
        found.cold += cold[s]
        verify[s + 1] += cold[s]
        alive = verify[s]
        depths = min(masks, total - 1 - s)
        for j in range(depths):
            rate = rates[s][j]
            found.drafted[j] += verify[s]
            found.reached[j] += alive
            found.accepted[j] += alive * rate
            (verify if covered else cold)[s + j + 1] += alive * (1 - rate)
            alive *= rate
        verify[min(s + depths + 1, total)] += alive
    return found


@dataclass
class Rates:
    """Of one sample, for every block start and depth, by temperature: acceptance of its own tokens, and overlap."""

    sample: Sample
    given_text: dict[float, dict[int, list[float]]]  # temperature -> start -> by depth: min(1, q(v)/p(v))
    overlap: dict[float, dict[int, list[float]]]  # temperature -> start -> by depth: sum_v min(p, q)


@torch.no_grad()
def rates(
    model: Any, samples: Sequence[Sample], masks: int, mask_token_id: int, temperatures: Sequence[float]
) -> Iterator[Rates]:
    """Measure a model (with its gated adapter, if it has one) on samples, one forward each; no gradient."""
    device = next(model.parameters()).device
    for sample in samples:
        batch = lay_out([[sample]], masks, masks, random.Random(0)).to(device)
        if batch.real.any():
            yield _of_sample(model, sample, batch, mask_token_id, temperatures)


def _of_sample(model: Any, sample: Sample, batch: Batch, mask_token_id: int, temperatures: Sequence[float]) -> Rates:
    before = forward.clean(model, batch)
    hidden = forward.masks(model, batch, before, mask_token_id)[batch.real]
    anchors, tokens = batch.at_masks(before.hidden)[batch.real], batch.targets()[batch.real]
    head = forward.head(model)
    size = max(1, CHUNK_BYTES // (4 * head.shape[0]))
    parts: dict[float, list] = {t: [] for t in temperatures}
    for first in range(0, len(hidden), size):
        rows = slice(first, first + size)
        q, p = (F.linear(x[rows], head).float() for x in (hidden, anchors))
        q[:, mask_token_id] = float("-inf")  # a mask token is never drafted
        for t in temperatures:
            parts[t].append(_accept(p, q, tokens[rows], t))
    starts = batch.start[batch.real].tolist()
    given, overlap = {}, {}
    for t, found in parts.items():
        by_text, by_overlap = (torch.cat(column).tolist() for column in zip(*found, strict=True))
        given[t], overlap[t] = _by_start(starts, by_text), _by_start(starts, by_overlap)
    return Rates(sample, given, overlap)


def _accept(p: torch.Tensor, q: torch.Tensor, tokens: torch.Tensor, temperature: float):
    """[R] acceptance given the text, and [R] overlap, of float32 logits [R, vocabulary]."""
    if temperature == 0:
        same = (p.argmax(-1) == q.argmax(-1)).float()
        return same, same
    p, q = F.softmax(p / temperature, -1), F.softmax(q / temperature, -1)
    at = tokens[:, None]
    ratio = (q.gather(1, at) / p.gather(1, at).clamp(min=1e-30))[:, 0].clamp(max=1)
    return ratio, torch.minimum(p, q).sum(-1)


def _by_start(starts: list[int], values: list[float]) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for start, value in zip(starts, values, strict=True):  # a block's masks stand in the order of their depth
        found.setdefault(start, []).append(value)
    return found


def forecast(measured: Sequence[Rates], temperature: float, masks: int, covered: bool = False) -> Chain:
    """Serving all samples at this temperature with `masks` mask slots (at most as many as were measured)."""
    total = Chain()
    for one in measured:
        total = total + chain(one.given_text[temperature], len(one.sample.prompt), len(one.sample), masks, covered)
    return total


def overlaps(measured: Sequence[Rates], temperature: float, masks: int) -> list[float]:
    """alpha by depth: the mean of sum_v min(p, q) over every place of the texts."""
    columns: list[list[float]] = [[] for _ in range(masks)]
    for one in measured:
        for row in one.overlap[temperature].values():
            for column, value in zip(columns, row, strict=False):
                column.append(value)
    return [sum(c) / max(1, len(c)) for c in columns]
