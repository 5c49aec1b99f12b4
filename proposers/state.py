"""The per-request state machine of ISD, free of vLLM types.

One decode forward of one request runs over `[x, d1..dk, M1..Mm]`: the pending token, the drafts that the previous
forward proposed, and fresh mask slots. It is a *verify* forward if k > 0, else *cold*.

    cold    --(proposals from its masks)-->                      verify
    verify  --(all k accepted: proposals from its masks)-->      verify
    verify  --(a draft rejected: its masks saw a wrong prefix)--> cold

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

    @property
    def width(self) -> int:
        """Slots behind the pending token: k + m."""
        return len(self.drafts) + self.masks


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


def all_accepted(row: Row, num_emitted: int) -> bool:
    """Whether a forward over `row` that emitted `num_emitted` tokens accepted all its drafts (accepted + 1 emitted)."""
    return num_emitted == len(row.drafts) + 1


@dataclass
class Records:
    """What each request's newest forward proposed, until the forward that verifies it takes it."""

    _rows: dict[str, Row] = field(default_factory=dict)

    def hand_over(self, request: str, row: Row) -> list[int]:
        """Remember `row` as the request's next one; returns its slots for the scheduler: drafts, then `MASK`s."""
        if row.width:
            self._rows[request] = row
        return [*row.drafts, *[MASK] * row.masks]

    def take(self, request: str, slots: Sequence[int]) -> Row:
        """The row of a forward that was scheduled with `slots`, and forget it: a record serves one forward.

        The scheduler may have cut the row short (token budget, the model's length) or padded it with `MASK`s of its
        own. Slots with drafts that no record knows (it was dropped by a preemption, say) yield an empty row: their q is
        lost, so they cannot be verified exactly, and masks behind them saw a prefix nobody will vouch for.
        """
        known = self._rows.pop(request, None)
        k = next((i for i, slot in enumerate(slots) if slot == MASK), len(slots))
        if k == 0:
            return Row(masks=len(slots))
        if known is None or list(known.drafts[:k]) != list(slots[:k]):
            return Row()
        proposal = known.proposal[:k] if known.proposal is not None else None
        return Row(known.drafts[:k], len(slots) - k, proposal)

    def drop(self, requests: Iterable[str]) -> None:
        """Forget the records of requests that finished, were aborted or preempted."""
        for request in requests:
            self._rows.pop(request, None)

    def __len__(self) -> int:
        return len(self._rows)
