"""The losses of a mask row against its anchor, by name, and how drafting quality is measured beside them.

For a mask row with distribution q and its anchor p (the clean row's distribution at the same place):

    ce = -log q(token)             the data's next token: the paper's loss
    kl = sum_v p(v) log(p(v)/q(v)) the anchor's whole distribution
    tv = 1 - sum_v min(p(v), q(v)) total variation: exactly the probability that a draft is rejected

p carries no gradient. Rows are worked on in chunks whose fp32 logits fit a fixed budget, and their gradient is taken at
once, so that neither logits nor probabilities of all rows are ever held: what stays is the hidden states' gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812

NAMES = ("ce", "kl", "tv")
CHUNK_BYTES = 64 << 20  # of fp32 logits in one chunk of rows
COMPILE_FROM = 1 << 24  # logits of a call from which compiling pays


@dataclass(frozen=True)
class Target:
    """What the mask rows are to match, R rows."""

    tokens: torch.Tensor  # [R] int64, the data's next token
    hidden: torch.Tensor | None  # [R, hidden] the anchors' hidden states; None where only `ce` is asked for
    head: torch.Tensor | None  # [vocabulary, hidden] the head that the anchors belong to


@dataclass(frozen=True)
class Measured:
    """Of every row, without gradient: the losses by name, acceptance and whether the likeliest tokens agree."""

    losses: dict[str, torch.Tensor]  # name -> [R] float32
    overlap: torch.Tensor  # [R] float32, sum_v min(p, q); of the token alone where there is no anchor: q(token)
    greedy: torch.Tensor  # [R] bool, argmax q = argmax p (= token where there is no anchor)


def check_names(weights: Mapping[str, float]) -> None:
    """ValueError for a loss that does not exist, or if all have weight 0."""
    for name in weights:
        if name not in NAMES:
            raise ValueError(f"loss: {name!r} is unknown; allowed are {', '.join(NAMES)}, each with its weight")
        if weights[name] < 0:
            raise ValueError(f"loss: {name} has weight {weights[name]}; allowed is 0 or more")
    if not any(weights.values()):
        raise ValueError(f"loss: every weight is 0 ({dict(weights)}); give at least one of {', '.join(NAMES)} a weight")


def chunk(
    q_logits: torch.Tensor,
    p_logits: torch.Tensor | None,
    tokens: torch.Tensor,
    row_weights: torch.Tensor,
    ce: float,
    kl: float,
    tv: float,
) -> tuple[torch.Tensor, ...]:
    """Losses of some rows, the gradient of their weighted sum: ce, kl, tv, overlap, greedy [R]; grad [R, vocabulary].

    Logits [R, vocabulary] float32, tokens [R] int64, row_weights [R] float32. With S = sum over {q < p} of q:
    d ce/dz = q - onehot, d kl/dz = q - p, d tv/dz = q S - q [q < p]. Without an anchor kl and tv are 0,
    and overlap is q(token).
    """
    q_norm = q_logits.logsumexp(-1, keepdim=True)
    q = (q_logits - q_norm).exp()
    ce_row = q_norm[:, 0] - q_logits.gather(1, tokens[:, None])[:, 0]
    places = torch.arange(q.shape[1], device=q.device)
    grad = (ce + kl) * q - ce * (places == tokens[:, None])
    if p_logits is None:
        zero = torch.zeros_like(ce_row)
        return ce_row, zero, zero, (-ce_row).exp(), q_logits.argmax(-1) == tokens, grad * row_weights[:, None]
    p_norm = p_logits.logsumexp(-1, keepdim=True)
    p = (p_logits - p_norm).exp()
    below = torch.where(q < p, q, 0.0)
    overlap = torch.minimum(p, q).sum(-1)
    kl_row = (p * (p_logits - q_logits)).sum(-1) - p_norm[:, 0] + q_norm[:, 0]
    grad = grad - kl * p + tv * (q * below.sum(-1, keepdim=True) - below)
    same = q_logits.argmax(-1) == p_logits.argmax(-1)
    return ce_row, kl_row, 1 - overlap, overlap, same, grad * row_weights[:, None]


@functools.cache
def _compiled():
    """`chunk` as a few fused passes over the vocabulary (in eager mode it takes several times as long)."""
    return torch.compile(chunk, dynamic=True)


class _Fused(torch.autograd.Function):
    """sum over rows of weight * (sum over losses of coefficient * loss), its gradient already taken in forward."""

    @staticmethod
    def forward(ctx, hidden, head, target, row_weights, names, sink):
        rows = max(1, CHUNK_BYTES // (4 * head.shape[0]))
        need_hidden, need_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_head = torch.zeros(head.shape, dtype=torch.float32, device=head.device) if need_head else None
        weights = {name: float(names.get(name, 0.0)) for name in NAMES}
        total = hidden.new_zeros((), dtype=torch.float32)
        work = _compiled() if hidden.shape[0] * head.shape[0] > COMPILE_FROM else chunk
        for first in range(0, hidden.shape[0], rows):
            part = slice(first, first + rows)
            q_logits = F.linear(hidden[part], head).float()
            p_logits = None if target.hidden is None else F.linear(target.hidden[part], target.head).float()
            *found, grad = work(q_logits, p_logits, target.tokens[part], row_weights[part], **weights)
            grad = grad.to(hidden.dtype)
            if need_hidden:
                grad_hidden[part] = grad @ head
            if need_head:
                grad_head += grad.T @ hidden[part]
            each = sum(weights[name] * value for name, value in zip(NAMES, found, strict=False))
            total += (each * row_weights[part]).sum()  # no matrix product: autocast would round it
            sink.append(found)
        ctx.save_for_backward(grad_hidden, None if grad_head is None else grad_head.to(head.dtype))
        return total

    @staticmethod
    def backward(ctx, grad):
        hidden, head = (None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors)
        return hidden, head, None, None, None, None


def fused(
    hidden: torch.Tensor,
    head: torch.Tensor,
    target: Target,
    row_weights: torch.Tensor,
    names: Mapping[str, float],
) -> tuple[torch.Tensor, Measured]:
    """The weighted loss of mask rows, a float32 scalar with gradient, and what was measured on the way.

    hidden [R, hidden] and head [vocabulary, hidden] in one dtype; row_weights [R] float32 (put the mean's 1/R in them);
    names: the weight of each loss, see `NAMES`.
    """
    sink: list = []
    loss = _Fused.apply(hidden, head, target, row_weights, dict(names), sink)
    ce, kl, tv, overlap, greedy = (torch.cat(column) for column in zip(*sink, strict=True))
    asked = {"ce": ce, "kl": kl, "tv": tv}
    return loss, Measured({name: asked[name] for name in NAMES if names.get(name)}, overlap, greedy)
