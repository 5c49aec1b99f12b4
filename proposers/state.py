"""The per-request state machine of ISD, free of vLLM types.

One decode forward of one request runs over `[x, d1..dk, M1..Mm]`: the pending token, the drafts that the previous
forward proposed, and fresh mask slots. It is a *verify* forward if k > 0, else *cold*.

    cold    --(proposals from its masks)-->                          verify
    verify  --(masks behind what was accepted: their proposals)-->   verify
    verify  --(none there: the masks saw a wrong prefix)-->          cold

The masks of the row itself stand behind all k drafts. It may carry *extra groups*, `[x, d1..dk, M.., Gi, Gj, ..]`: the
masks of Gj stand behind dj (j < k), for the case that j drafts are accepted (arXiv 2507.11851 calls it quadratic
decoding). They are not causal: a mask of Gj sees the sequence up to dj and its own group, at the places behind dj. The
chain comes first, so that the keys and values of accepted drafts are where they must be.

What a slot is, is decided by its place in the record kept here, never by its token id. Towards a scheduler a mask slot
is `MASK` = -1, an id that no token has, so a draft can never be mistaken for a mask or the reverse.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MASK = -1


class Row(NamedTuple):
    """The slots behind the pending token of one request in one forward."""

    drafts: Sequence[int] = ()  # k token ids to verify
    masks: int = 0  # m mask slots whose logits may serve as proposals
    proposal: Any = None  # [k, vocab] logits the drafts were drawn from (q); None: one-hot proposals
    extra: tuple[tuple[int, int], ...] = ()  # extra groups, in their order: (j accepted, m masks)
    confidence: Sequence[float] = ()  # q of each draft, where it was asked for

    @property
    def all_masks(self) -> int:
        """Mask slots of the row, those of extra groups included."""
        return self.masks + sum(m for _, m in self.extra)

    @property
    def width(self) -> int:
        """Slots behind the pending token: drafts and masks."""
        return len(self.drafts) + self.all_masks

    def group(self, accepted: int) -> tuple[int, int]:
        """The masks that stand behind `accepted` drafts: their place among the row's masks, and how many (0: none)."""
        place = self.masks
        if accepted == len(self.drafts):
            return 0, self.masks
        for j, m in self.extra:
            if j == accepted:
                return place, m
            place += m
        return 0, 0


def plan_slots(num_proposals: int, masks: int, remaining: int) -> tuple[int, int]:
    """How many drafts and masks the next forward carries: (k, m).

    num_proposals: drafts at hand; masks: n - 1; remaining: tokens the request may still emit (>= 1). A forward emits at
    most k + 1 tokens, so no more than remaining - 1 drafts are worth verifying, and masks are worth carrying only for
    drafts that a later forward could still use. The choice never looks at a draft's value: dropping a draft for what it
    is would bias the output.
    """
    drafts = min(num_proposals, max(remaining - 1, 0))
    left = remaining - drafts - 1  # after this forward, if all are accepted
    return drafts, min(masks, max(left - 1, 0))


def plan_groups(num_drafts: int, masks: int, remaining: int, wanted: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """The extra groups of the next forward: (j accepted, m masks), for those of `wanted` that can be of use.

    num_drafts: k of `plan_slots`; masks, remaining: as there. After j accepted drafts and one more token,
    remaining - j - 1 are left, of which the last is never a draft.
    """
    groups = ((j, min(masks, remaining - j - 2)) for j in wanted if j < num_drafts)
    return tuple((j, m) for j, m in groups if m > 0)


def _cut(groups: Iterable[tuple[int, int]], slots: int) -> tuple[tuple[int, int], ...]:
    """What is left of the groups in that many slots."""
    kept = []
    for j, m in groups:
        if slots > 0:
            kept.append((j, min(m, slots)))
        slots -= m
    return tuple(kept)


@dataclass
class Records:
    """What each request's newest forward proposed, until the forward that verifies it takes it."""

    _rows: dict[str, Row] = field(default_factory=dict)

    def hand_over(self, request: str, row: Row) -> list[int]:
        """Remember `row` as the request's next one; returns its slots for the scheduler: drafts, then `MASK`s."""
        if row.width:
            self._rows[request] = row
        return [*row.drafts, *[MASK] * row.all_masks]

    def take(self, request: str, slots: Sequence[int]) -> Row:
        """The row of a forward that was scheduled with `slots`, and forget it: a record serves one forward.

        The scheduler may have cut the row short (token budget, the model's length; extra groups go first) or padded it
        with `MASK`s of its own. Slots with drafts that no record knows (it was dropped by a preemption, say) yield an
        empty row: their q is lost, so they cannot be verified exactly, and masks behind them saw a prefix nobody will
        vouch for.
        """
        known = self._rows.pop(request, None)
        k = next((i for i, slot in enumerate(slots) if slot == MASK), len(slots))
        if k == 0:
            return Row(masks=len(slots))
        if known is None or list(known.drafts[:k]) != list(slots[:k]):
            return Row()
        proposal = known.proposal[:k] if known.proposal is not None else None
        masks, extra = len(slots) - k, ()
        if known.extra:
            masks, extra = min(known.masks, masks), _cut(known.extra, masks - known.masks)
        return Row(known.drafts[:k], masks, proposal, extra, known.confidence[:k])

    def drop(self, requests: Iterable[str]) -> None:
        """Forget the records of requests that finished, were aborted or preempted."""
        for request in requests:
            self._rows.pop(request, None)

    def __len__(self) -> int:
        return len(self._rows)
