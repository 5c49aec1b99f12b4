"""Drafts by script in place of a model's own: how `idlm doctor --engine` makes them all right, or all wrong.

Set by `collective_rpc("isd_force", ..)`, which no request reaches; None in every engine that serves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_NONE = -1  # in a table: no token is told for this place


class Forced:
    """Scripts of requests: token ids by place in the sequence, the prompt's at its beginning. For greedy requests."""

    def __init__(self, scripts: dict[str, list[int]]) -> None:
        """scripts: by the name that a request was added under; vLLM adds a dash and eight digits to it."""
        self._scripts = scripts
        self._table: Tensor | None = None

    def _name(self, request: str) -> str:
        return request if request in self._scripts else request.rpartition("-")[0]

    def ahead(self, request: str, place: int, drafts: Sequence[int]) -> list[int]:
        """`drafts` of one request, for places of its sequence from `place` on, with what its script says there."""
        told = self._scripts.get(self._name(request), [])[place : place + len(drafts)]
        return [*told, *drafts[len(told) :]]

    def over(self, requests: Sequence[str], places: Tensor, drafts: Tensor) -> Tensor:
        """The same for a batch, without waiting for the device. places: [B], of each first draft; drafts: [B, K]."""
        if self._table is None:
            self._table = self._as_table().to(drafts.device)
        order = {name: i for i, name in enumerate(self._scripts)}
        rows = torch.tensor([order.get(self._name(request), len(order)) for request in requests])
        at = places.unsqueeze(1) + torch.arange(drafts.shape[1], device=drafts.device)
        rows = rows.to(drafts.device, non_blocking=True).unsqueeze(1)
        told = self._table[rows, at.clamp(max=self._table.shape[1] - 1)]
        return torch.where(told == _NONE, drafts, told)

    def _as_table(self) -> Tensor:
        """[scripts + 1, longest + 1], the last row and column empty: for requests and places that have no script."""
        width = max(map(len, self._scripts.values()), default=0) + 1
        rows = [[*script, *[_NONE] * (width - len(script))] for script in self._scripts.values()]
        return torch.tensor([*rows, [_NONE] * width])
