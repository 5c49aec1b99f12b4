"""The training objective as a module: a batch in, a loss out, so that any of accelerate's wrappers can hold it.

Gated form: sum over losses of weight * mean over mask rows, against the base's distribution; only the adapter learns.
Full form: CE_masked + s CE_clean with s fixed or the detached ratio of the two (arXiv 2604.11035, training).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vllm_idlm.training import forward, losses
from vllm_idlm.training.config import Config
from vllm_idlm.training.layout import Batch


@dataclass
class Sums:
    """Measurements of a step, summed over its mask rows by depth; they add up over forwards and devices."""

    rows: torch.Tensor  # [depths] float64, mask rows
    overlap: torch.Tensor  # [depths] float64
    greedy: torch.Tensor  # [depths] float64
    losses: dict[str, float] = field(default_factory=dict)  # name -> sum over all mask rows

    def __add__(self, other: Sums) -> Sums:
        names = {**self.losses, **other.losses}
        joined = {k: self.losses.get(k, 0.0) + other.losses.get(k, 0.0) for k in names}
        return Sums(self.rows + other.rows, self.overlap + other.overlap, self.greedy + other.greedy, joined)

    def over(self, add: Callable[[torch.Tensor], torch.Tensor]) -> Sums:
        """The sums over devices; `add` sums a tensor over them."""
        names, depths = sorted(self.losses), len(self.rows)
        totals = torch.tensor([self.losses[name] for name in names], dtype=torch.float64)
        flat = add(torch.cat([self.rows, self.overlap, self.greedy, totals]))
        *columns, totals = flat.split([depths] * 3 + [len(names)])
        return Sums(*columns, dict(zip(names, totals.tolist(), strict=True)))

    def means(self) -> dict[str, Any]:
        """Mask rows, and the mean of each loss, of overlap (alpha) and of greedy agreement, the latter by depth too."""
        rows, total = self.rows.clamp(min=1), max(1.0, float(self.rows.sum()))
        return {
            "mask_tokens": int(self.rows.sum()),
            **{name: value / total for name, value in self.losses.items()},
            "alpha": float(self.overlap.sum()) / total,
            "overlap": (self.overlap / rows).tolist(),
            "greedy": (self.greedy / rows).tolist(),
        }


def sums(measured: losses.Measured, depth: torch.Tensor, depths: int) -> Sums:
    """Measurements by depth; depth [R] int64."""

    def by_depth(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(depths, dtype=torch.float64, device=depth.device).index_add_(0, depth, values.double()).cpu()

    counts = by_depth(torch.ones_like(measured.overlap))
    totals = {name: float(value.sum()) for name, value in measured.losses.items()}
    return Sums(counts, by_depth(measured.overlap), by_depth(measured.greedy), totals)


class Objective(nn.Module):
    """The loss of a batch; `last` holds what was measured on the way.

    mean: the mean of a tensor over the devices, so that their gradients' mean is the whole batch's gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        mask_token_id: int,
        mean: Callable[[torch.Tensor], torch.Tensor] = lambda value: value,
    ) -> None:
        super().__init__()
        self.mean = mean
        self.model = model
        self.config = config
        self.mask_token_id = mask_token_id
        self.last: Sums | None = None

    def forward(self, work: Batch | Callable[[nn.Module], Any]) -> Any:
        """A scalar with gradient, float32; or, of a function, what it gives for the model.

        Whatever runs the model runs in here: weights that are shared out over devices are whole in a forward only.
        """
        if not isinstance(work, Batch):
            return work(self.model)
        return self._gated(work) if self.config.form == "gated" else self._full(work)

    def _gated(self, batch: Batch) -> torch.Tensor:
        real, weight = batch.real, forward.head(self.model)
        before = forward.clean(self.model, batch)
        hidden = forward.masks(self.model, batch, before, self.mask_token_id)[real]
        anchors = batch.at_masks(before.hidden)[real]
        target = losses.Target(batch.targets()[real], anchors, weight)
        return self._mask_loss(hidden, weight, target, batch.depth[real])

    def _full(self, batch: Batch) -> torch.Tensor:
        real, weight = batch.real, forward.head(self.model)
        clean, masked = forward.both(self.model, batch, self.mask_token_id)
        anchors = batch.at_masks(clean)[real].detach()
        target = losses.Target(batch.targets()[real], anchors, weight.detach())
        of_masks = self._mask_loss(masked[real], weight, target, batch.depth[real])
        tokens = batch.clean_targets()
        learnt = tokens >= 0
        count = self.mean(learnt.sum().float()).clamp(min=1)
        equal = (1 / count).expand(int(learnt.sum()))
        of_clean, _ = losses.fused(clean[learnt], weight, losses.Target(tokens[learnt], None, None), equal, {"ce": 1.0})
        share = self.config.clean_weight
        if share == "auto":
            share = self.mean(of_masks.detach()) / self.mean(of_clean.detach())
        return of_masks + share * of_clean

    def _mask_loss(self, hidden, weight, target: losses.Target, depth: torch.Tensor) -> torch.Tensor:
        given = self.config.depth_weights
        depths = self.config.stride - 1
        by_depth = torch.tensor([given[min(i, len(given) - 1)] for i in range(depths)], device=depth.device)
        row_weights = by_depth[depth]
        row_weights = row_weights / self.mean(row_weights.sum()).clamp(min=1e-9)
        loss, measured = losses.fused(hidden, weight, target, row_weights, self.config.loss)
        self.last = sums(measured, depth, depths)
        return loss
