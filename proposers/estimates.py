"""Running estimates that coverage is chosen by: acceptance of drafts, and the time of a forward."""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

_EDGES = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)  # of q(draft), the confidence of a draft


class Acceptance:
    """Acceptance of drafts by place and by confidence, of the last thousand or so, on top of a weak prior.

    Counts fade with every step, also without drafts: an estimate that stopped drafting is forgotten in time, the prior
    returns, and drafting is tried again.
    """

    def __init__(self, places: int, prior: float = 0.6, weight: float = 8.0, keep: float = 0.998) -> None:
        """places: drafts of a row. prior, weight: acceptance where nothing is known, and its worth in drafts."""
        self._counts = np.zeros((places, len(_EDGES) + 1, 2))  # accepted, tried
        self._prior, self._weight, self._keep = prior, weight, keep

    def fade(self) -> None:
        """A step has passed."""
        self._counts *= self._keep

    def observe(self, confidence: Sequence[float], accepted: int) -> None:
        """A row was verified: q of its drafts, how many were accepted. Drafts behind the first rejected say nothing."""
        for place, q in enumerate(confidence[: accepted + 1]):
            self._counts[place, bisect_right(_EDGES, q)] += (place < accepted, 1)

    def count(self, drafts: np.ndarray, accepted: np.ndarray) -> None:
        """Rows were verified, drafts and accepted of each [B] int, of drafts whose confidence is not known."""
        for place in range(len(self._counts)):
            tried = (drafts > place) & (accepted >= place)
            self._counts[place, 0] += ((tried & (accepted > place)).sum(), tried.sum())

    def by_place(self) -> list[float]:
        """a_1 .. a_k over all drafts."""
        accepted, tried = self._counts.sum(1).T
        return ((accepted + self._weight * self._prior) / (tried + self._weight)).tolist()

    def of(self, confidence: Sequence[float]) -> list[float]:
        """a_1 .. a_k of a row with drafts of these confidences."""
        found = []
        for place, (q, mean) in enumerate(zip(confidence, self.by_place(), strict=False)):
            accepted, tried = self._counts[place, bisect_right(_EDGES, q)]
            found.append(float((accepted + self._weight * mean) / (tried + self._weight)))
        return found


class Cost:
    """Seconds of a forward by its rows: a calibrated table, corrected by what the steps really took.

    Attention, sampling, scheduling and ISD's own work are not in the table, and they are not the same with mask slots
    as without: what steps of one kind took says nothing of the other. So each kind has a correction of its own, a line
    over rows fitted to its last fifty or so steps (the slope is held back until rows have varied). A kind that is not
    run is taken for what it was, or at first for the table, which is too good; so it is tried, and found out. What is
    known of it fades over thousands of steps, and it is tried again.

    A machine that slows down slows both: once a kind is known well, what its steps get dearer or cheaper by is passed
    on to the other kind as a factor. Else the kind that is not run would keep the times of a better hour, and be tried.
    """

    _PAUSES = 5  # steps in a row that are left out
    _KNOWN = 40  # steps (of the fifty that count) from which on a change is the machine's, not something learnt

    def __init__(
        self,
        rows: Sequence[int],
        plain: Sequence[float],
        masked: Sequence[float],
        keep: float = 0.98,
        keep_other: float = 0.999,
    ) -> None:
        """rows: ascending; plain, masked: seconds of a forward with that many rows, without and with mask slots.

        keep, keep_other: what a step leaves of the older ones of its own kind, and of the other kind.
        """
        self._rows = np.asarray(rows, dtype=float)
        self._tables = {False: np.asarray(plain, dtype=float), True: np.asarray(masked, dtype=float)}
        self._keep, self._keep_other = keep, keep_other
        self._sums = {False: np.zeros(5), True: np.zeros(5)}  # 1, x, xx, y, xy; y in seconds of the time they were at
        self._drift = {False: 1.0, True: 1.0}  # what seconds of each kind have become since
        self._refused = {False: 0, True: 0}  # steps in a row
        self.table = functools.lru_cache(maxsize=1024)(self._table)  # asked for several times a step

    def _table(self, rows: int, masked: bool) -> float:
        """Seconds by the table alone, in between and beyond its entries along straight lines."""
        known = self._tables[masked]
        if rows <= self._rows[-1] or len(known) == 1:
            return float(np.interp(rows, self._rows, known))
        slope = (known[-1] - known[-2]) / (self._rows[-1] - self._rows[-2])
        return float(known[-1] + slope * (rows - self._rows[-1]))

    def observe(self, rows: int, masked: bool, seconds: float) -> None:
        """A step with that many rows took that long.

        Over three times the estimate, or the table's before there is one, is a pause or a kernel's first compilation,
        and left out, unless it goes on.
        """
        before, known = self(rows, masked), self._sums[masked][0]
        if seconds > 3 * (before if known > 4 else self.table(rows, masked)):
            self._refused[masked] += 1
            if self._refused[masked] <= self._PAUSES:
                return
            if self._refused[masked] == self._PAUSES + 1 and known > 4:
                self._sums[masked] = np.zeros(5)  # no pause: this is what steps take now
        else:
            self._refused[masked] = 0
        y = seconds / self._drift[masked] - self.table(rows, masked)
        self._sums[masked] = self._sums[masked] * self._keep + (1, rows, rows * rows, y, rows * y)
        self._sums[not masked] = self._sums[not masked] * self._keep_other
        if self._sums[masked][0] > self._KNOWN:
            drift = self._drift[not masked] * self(rows, masked) / before
            self._drift[not masked] = float(np.clip(drift, 1 / 4, 4))

    def _too_dear(self, masked: bool) -> float:
        """At most 1: what steps of the other kind were faster than its table by. So much is the table too dear here.

        (Where it was measured without the graphs that serve, say.) A kind that is not run must not look dearer than it
        may be, or it would never be tried.
        """
        count, x, _, y, _ = self._sums[not masked]
        if count <= 1:
            return 1.0
        table = self.table(round(x / count), not masked)
        return float(np.clip((table + y / count) / table, 0.05, 1.0))

    def known(self, masked: bool) -> float:
        """Steps of that kind that are remembered, each by its weight."""
        return float(self._sums[masked][0])

    def __call__(self, rows: int, masked: bool) -> float:
        """Seconds expected of a step."""
        count, x, xx, y, xy = self._sums[masked]
        table, line = self.table(rows, masked), 0.0
        if count:
            spread = xx - x * x / count
            slope = (xy - x * y / count) / (spread + 16 * count)  # as if rows had varied by 4 around a flat line
            line = (y - slope * x) / count + slope * rows
        own = count / (count + 0.2)  # as if a fifth of a step had been as the table says
        drift, share = self._drift[masked], self._too_dear(masked)
        prior = min(drift, share) if drift < 1 else drift * share  # a machine that got faster is both: once is enough
        return float(max(own * (table + line) * drift + (1 - own) * table * prior, 1e-6))
