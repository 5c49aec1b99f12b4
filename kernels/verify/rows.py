"""What `verify_rows` takes and gives, and its plain torch form: the oracle of `triton.py`.

The rule is that of `naive.py`. What differs is the shape: a fixed number of rows a request, with the number of drafts
known to the device alone, as under asynchronous scheduling; and the noise, which is drawn here, by counter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from vllm_idlm.kernels.noise import ACCEPT, RESAMPLE
from vllm_idlm.kernels.noise import naive as noise


class Rows(NamedTuple):
    """The verified rows of B requests: x, d1..dk, whose logits are the anchors p1..pk and the certain row p(k+1).

    With m the most drafts of a request (n - 1) and R request slots, of which a batch has B.
    """

    logits: Tensor  # [N, V] any float dtype, of the forward, options not applied; NaN counts as -inf
    first_row: Tensor  # [B] int, each request's row of x in `logits`; its rows follow each other
    num_drafts: Tensor  # [B] int, the k of each, 0 <= k <= m
    drafts: Tensor  # [B, m] int64, the first k of each row are its drafts
    position: Tensor  # [B] int64, place of x in the sequence: the noise's counter
    slot: Tensor  # [B] int64, index into the tensors by request slot
    temperature: Tensor  # [R] float32, 0: greedy
    seed: Tensor  # [R] int64
    proposal: Tensor | None = None  # [R, m, V] logits of q before temperature; None: drafts are argmaxes, q is one-hot
    processed: Tensor | None = None  # [P, V] float32 logits with every option and the temperature in them
    processed_first: Tensor | None = None  # [B] int, each request's row of x in `processed`, -1: use `logits`


class Verdict(NamedTuple):
    """What one forward emitted for each request."""

    tokens: Tensor  # [B, m + 1] int64, accepted drafts, then one more token, then -1
    emitted: Tensor  # [B] int32, accepted + 1


def verify_rows(rows: Rows) -> Verdict:
    """Accept drafts left to right, then emit one more token, so that every emitted token is distributed as p.

    A draft is accepted if `u q(d) < p(d)`. The emitted token wins a race of exponentials over max(p - q, 0) without the
    rejected draft, or over p if all were accepted (or where p and q are equal up to rounding). A greedy request accepts
    argmaxes (lowest index at a tie) and emits one.
    """
    batch, most = rows.drafts.shape
    p = torch.stack([_anchors(rows, j) for j in range(most + 1)], 1)  # [B, m + 1, V] log-probabilities
    q = _proposals(rows)
    accept = _accepts(rows, p, q)
    place = torch.arange(most, device=p.device)
    accept &= place < rows.num_drafts.unsqueeze(1)
    accepted = accept.long().cumprod(1).sum(1)
    token = _emit(rows, p, q, accepted)
    tokens = torch.where(place < accepted.unsqueeze(1), rows.drafts, -1)
    tokens = torch.cat([tokens, tokens.new_full((batch, 1), -1)], 1).scatter(1, accepted.unsqueeze(1), token[:, None])
    return Verdict(tokens, (accepted + 1).int())


def _anchors(rows: Rows, place: int) -> Tensor:
    """log p of each request's row `place`, [B, V] float32; rows behind the certain one are of no use, but harmless."""
    behind = torch.full_like(rows.num_drafts, place).minimum(rows.num_drafts).long()
    found = rows.logits[rows.first_row.long() + behind].float()
    temperature = rows.temperature[rows.slot]
    found = found / torch.where(temperature == 0, 1.0, temperature).unsqueeze(1)
    if rows.processed is not None:
        own = rows.processed_first >= 0
        made = rows.processed[(rows.processed_first.long() + behind).clamp(min=0).where(own, 0)]
        found = torch.where(own.unsqueeze(1), made, found)
    return _log_softmax(found)


def _proposals(rows: Rows) -> Tensor | None:
    """log q, [B, m, V] float32."""
    if rows.proposal is None:
        return None
    temperature = rows.temperature[rows.slot]
    scale = torch.where(temperature == 0, 1.0, temperature)[:, None, None]
    return _log_softmax(rows.proposal[rows.slot].float() / scale)


def _log_softmax(logits: Tensor) -> Tensor:
    """With NaN as -inf, before and after: a row of nothing but -inf stays one."""
    found = torch.where(logits.isnan(), float("-inf"), logits).log_softmax(-1)
    return torch.where(found.isnan(), float("-inf"), found)


def _accepts(rows: Rows, p: Tensor, q: Tensor | None) -> Tensor:
    """Whether each draft would be accepted if all before it were, [B, m] bool."""
    tokens = rows.drafts.clamp(min=0).unsqueeze(-1)
    greedy = rows.temperature[rows.slot] == 0
    best = p[:, :-1].argmax(-1) == rows.drafts
    log_p = p[:, :-1].gather(-1, tokens).squeeze(-1)
    log_q = torch.zeros_like(log_p) if q is None else q.gather(-1, tokens).squeeze(-1)
    places = rows.position.unsqueeze(1) + torch.arange(rows.drafts.shape[1], device=p.device)
    u = noise.uniform(rows.seed[rows.slot].unsqueeze(1), torch.zeros_like(places), places, ACCEPT)
    return torch.where(greedy.unsqueeze(1), best, u.log() + log_q < log_p)


def _emit(rows: Rows, p: Tensor, q: Tensor | None, accepted: Tensor) -> Tensor:
    """The token after the accepted drafts, [B] int64."""
    batch = torch.arange(len(accepted), device=p.device)
    anchor = p[batch, accepted]
    rejected = accepted < rows.num_drafts
    draft = accepted.clamp(max=rows.drafts.shape[1] - 1)
    rest = anchor.exp()
    if q is not None:
        rest = (rest - q[batch, draft].exp().masked_fill(~rejected.unsqueeze(1), 0.0)).clamp(min=0)
    token = rows.drafts[batch, draft].clamp(min=0).unsqueeze(1)
    rest = rest.scatter(1, token, rest.gather(1, token).masked_fill(rejected.unsqueeze(1), 0.0))
    rest = torch.where((rest > 0).any(-1, keepdim=True), rest, anchor.exp())
    index = torch.arange(p.shape[-1], device=p.device)
    places = (rows.position + accepted).unsqueeze(1)
    race = noise.exponential(rows.seed[rows.slot].unsqueeze(1), index, places, RESAMPLE)
    drawn = (rest.log() - race.log()).argmax(-1)
    return torch.where(rows.temperature[rows.slot] == 0, anchor.argmax(-1), drawn)
