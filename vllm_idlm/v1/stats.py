"""What ISD's forwards did, counted where they are known: in the worker, after each step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import numpy as np

from vllm_idlm.proposers.state import Row


@dataclass
class ISDStats:
    """Counts since the last reset, over all requests. TPF = emitted / forwards (of decode; prefill not counted)."""

    accepted_all: int = 0  # verify forwards that accepted every draft
    rejected: int = 0  # verify forwards that rejected one
    cold: int = 0  # decode forwards without drafts
    emitted: int = 0  # tokens emitted by decode forwards
    rows: int = 0  # rows that those forwards ran over: pending tokens, drafts, mask slots
    drafted_per_position: list[int] = field(default_factory=list)  # verified drafts, by place in the row
    accepted_per_position: list[int] = field(default_factory=list)
    seconds: float = 0.0  # host time in ISD's own code: plan, LoRA mapping, verification, proposals
    steps: int = 0  # engine steps that ISD's code ran in
    trace: dict[str, list[dict]] | None = None  # per request, forward by forward; None: not recorded

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Adds the time of the block to `seconds`."""
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began

    def observe(self, forwards: Sequence[tuple[str, Row, list[int]]]) -> None:
        """Count one decode forward of each of several requests: request, its row, the tokens it emitted."""
        drafts = np.array([len(row.drafts) for _, row, _ in forwards], dtype=np.int64)
        emitted = np.array([len(tokens) for _, _, tokens in forwards], dtype=np.int64)
        self.count(drafts, emitted, sum(1 + row.width for _, row, _ in forwards))
        if self.trace is not None:
            for forward in forwards:
                self.record(*forward)

    def count(self, drafts: np.ndarray, emitted: np.ndarray, rows: int) -> None:
        """Count one decode forward of each of several requests.

        drafts, emitted: [B] drafts verified and tokens emitted (> 0); rows: of all of them.
        """
        self.rows += rows
        had = drafts > 0
        whole = emitted == drafts + 1
        self.cold += int((~had).sum())
        self.accepted_all += int((had & whole).sum())
        self.rejected += int((had & ~whole).sum())
        self.emitted += int(emitted.sum())
        most = int(drafts.max(initial=0))
        missing = [0] * max(most - len(self.drafted_per_position), 0)
        self.drafted_per_position += missing
        self.accepted_per_position += missing
        for place in range(most):
            self.drafted_per_position[place] += int((drafts > place).sum())
            self.accepted_per_position[place] += int(((drafts > place) & (emitted - 1 > place)).sum())

    def count_bare(self, requests: int) -> None:
        """Count a decode forward without slots of that many requests: a row and a token each."""
        self.rows += requests
        self.cold += requests
        self.emitted += requests

    def record(self, request: str, row: Row, tokens: list[int]) -> None:
        """Enter a forward into the trace."""
        forward = {"drafts": list(row.drafts), "masks": row.masks, "accepted": len(tokens) - 1, "tokens": list(tokens)}
        if row.extra:
            forward["extra"] = [list(group) for group in row.extra]
        self.trace.setdefault(request, []).append(forward)

    def as_dict(self) -> dict:
        """Plain numbers, with `forwards`, `tpf` and `rows_per_token` (None before the first forward) worked out."""
        forwards = self.accepted_all + self.rejected + self.cold
        made = {**asdict(self), "forwards": forwards, "tpf": self.emitted / forwards if forwards else None}
        return {**made, "rows_per_token": self.rows / self.emitted if forwards else None}
