"""What the next rows of requests are to carry: fixed by the settings, or chosen as it goes (`"coverage": "auto"`)."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

from vllm_idlm.proposers.coverage import Choice, choose, settle, worthwhile
from vllm_idlm.proposers.estimates import Acceptance, Cost
from vllm_idlm.proposers.state import Row
from vllm_idlm.settings import ISDSettings


class Fixed:
    """Stride and groups as the settings say."""

    confident = False  # whether drafts are to come with their confidence

    def __init__(self, settings: ISDSettings) -> None:
        self._settings = settings

    def begin(self, requests: Collection[str], rows: int, tokens: int) -> None:
        """A step begins: its requests, the rows that they would have all decoding, the tokens vLLM scheduled in all."""

    def observe(self, forwards: Sequence[tuple[str, Row, list[int]]]) -> None:
        """What a step's decode forwards emitted: request, row, tokens."""

    def stride(self, requests: int) -> int:
        """The stride of a forward with that many requests."""
        return self._settings.stride(requests)

    def groups(self, confidence: Sequence[float], seeded: bool = False) -> tuple[int, ...]:
        """The extra groups of a row whose drafts have these confidences; seeded: the request has its own seed."""
        return self._settings.groups


class Auto(Fixed):
    """The stride and groups with the most tokens a second (`proposers.coverage`), looked at anew every few steps."""

    confident = True
    _EVERY = 8  # steps between choices while the number of requests stays

    def __init__(self, settings: ISDSettings, cost: Cost) -> None:
        super().__init__(settings)
        self.cost, self.acceptance = cost, Acceptance(settings.masks)
        self.choice: Choice | None = None
        self._requests = self._age = 0
        self._last: tuple[float, set[str], int, bool] | None = None  # of the step before: began, requests, rows, masks

    def begin(self, requests: Collection[str], rows: int, tokens: int) -> None:
        """Times the step before, if it was all decoding and this one goes on with it."""
        now = time.perf_counter()
        if self._last is not None:
            began, before, count, masked = self._last
            if not before.isdisjoint(requests):  # nothing was waited for
                self.cost.observe(count, masked, now - began)
        self._last = (now, set(requests), rows, rows > len(requests)) if tokens == rows else None
        self.acceptance.fade()

    def observe(self, forwards: Sequence[tuple[str, Row, list[int]]]) -> None:
        """Counts which drafts were accepted."""
        for _, row, tokens in forwards:
            if row.drafts:
                self.acceptance.observe(row.confidence, len(tokens) - 1)

    def stride(self, requests: int) -> int:
        """The stride chosen for that many requests, below the schedule's."""
        self._age += 1
        if self.choice is None or requests != self._requests or self._age >= self._EVERY:
            most = self._settings.stride(requests) - 1
            acceptance = self.acceptance.by_place()[:most]
            self.choice = settle(choose, acceptance, self.cost, requests, self._settings.extra)
            self._requests, self._age = requests, 0
        return self.choice.stride

    def groups(self, confidence: Sequence[float], seeded: bool = False) -> tuple[int, ...]:
        """The groups that pay for these drafts; none for a seeded request, whose noise they would shift."""
        return () if seeded else worthwhile(self.acceptance.of(confidence), self.choice)[: self._settings.extra]
