"""Exact verification in plain torch: accept drafts left to right, then emit one more token.

A request with k drafts has k + 1 rows of logits: the anchors p1..pk, which predict d1..dk, and the certain row p(k+1).
Speculative sampling (arXiv 2211.17192, section 2.3; in strided form arXiv 2604.11035):

    accept d_i  with probability  min(1, p_i(d_i) / q_i(d_i)),  stop at the first rejection;
    rejected at i:  emit from  norm(max(p_i - q_i, 0));     all accepted:  emit from  p(k+1).

Every emitted token is then distributed as p, whatever q is:

    P(emit v) = min(p(v), q(v)) + sum_u max(q(u) - p(u), 0) * max(p(v) - q(v), 0) / sum_u max(p(u) - q(u), 0)
              = min(p(v), q(v)) + max(p(v) - q(v), 0) = p(v),

because the two sums are both the total variation of p and q. It holds only if d_i was drawn from q_i, and if the draws
of drafts, of acceptance and of the emitted token are independent of each other.

A one-hot q (an argmax draft) accepts d with probability p(d), else emits from p without d. A greedy request accepts d
if and only if it is the argmax of p, and emits argmaxes: plain greedy decoding, token for token.

Works on any device, without a loop over requests and without waiting for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from vllm_idlm.kernels.draft.naive import draw, rows_of_piece


class Verdict(NamedTuple):
    """What one forward emitted for each request."""

    tokens: Tensor  # [B, K + 1] int64, accepted drafts, then one more token, then -1
    accepted: Tensor  # [B] int64, drafts accepted, 0 <= accepted <= num_drafts


def verify(
    logits: Tensor,
    drafts: Tensor,
    num_drafts: Tensor,
    *,
    max_drafts: int,
    proposal_logits: Tensor | None = None,
    one_hot: Tensor | None = None,
    greedy: Tensor | None = None,
    uniform: Tensor | None = None,
    resample: Tensor | None = None,
) -> Verdict:
    """Verify the drafts of a batch of B requests with k_i drafts each; D = sum k_i, R = D + B. Inputs are not changed.

    logits:          [R, V] float32, k_i + 1 rows a request, requests in order; p = softmax(logits), so temperature,
                     truncation and every other option are already in them (excluded tokens are -inf).
    drafts:          [D] int64, in the same order.
    num_drafts:      [B] int64, the k_i, 0 <= k_i <= max_drafts.
    max_drafts:      K, known to the host, so that no shape waits for the device.
    proposal_logits: [D, V] float32, q = softmax(proposal_logits), what the drafts were drawn from; None: all one-hot.
    one_hot:         [D] bool, drafts whose q is one-hot although proposal_logits is given (its rows are then not
                     used); None: none.
    greedy:          [B] bool, requests that decode greedily (a tie goes to the lowest index); None: all.
    uniform:         [D] float64 in [0, 1), decides acceptance. Needed unless greedy is None.
    resample:        [B] float64 in [0, 1), draws the emitted token. Needed unless greedy is None.

    With equal noise the verdict of a request does not depend on the rest of the batch.

    Cost: all greedy, one argmax over [R, V] and no copy. Sampled: besides that one pass each over logits and
    proposal_logits for the probabilities of the drafts, and a few passes over the one row that a request emits from.
    Memory beyond the inputs: about five temporaries of one piece of rows (4 MiB each on a CPU, 256 MiB on a GPU, or one
    row if that is larger, and never more than [R, V]).
    Raises ValueError for shapes that do not fit each other or missing noise.
    """
    check(logits, drafts, num_drafts, max_drafts, proposal_logits, greedy, uniform, resample)
    where = Places.of(num_drafts, drafts.shape[0], max_drafts)
    best = logits.argmax(-1)
    accept = drafts == best[where.row]
    if greedy is not None:
        passed = _passes(logits, drafts, where.row, proposal_logits, one_hot, uniform)
        accept = torch.where(greedy[where.request], accept, passed)
    accepted = where.leading(accept)
    last = where.first_row + accepted
    emitted = best[last]
    if greedy is not None:
        rejected = accepted < num_drafts
        rows = rows_of_piece(logits)
        per_request = (last, where.first_draft + accepted, rejected, resample)
        pieces = zip(*(x.split(rows) for x in per_request), strict=True)
        sampled = torch.cat([_emit(logits, drafts, proposal_logits, one_hot, *piece) for piece in pieces])
        emitted = torch.where(greedy, emitted, sampled)
    return Verdict(where.line_up(drafts, accepted, emitted), accepted)


class Places(NamedTuple):
    """Where the drafts and rows of each request lie in the flat inputs."""

    request: Tensor  # [D] the request of each draft
    row: Tensor  # [D] the row of logits that verifies each draft
    slot: Tensor  # [D] the place of each draft in its request, from 0
    first_row: Tensor  # [B]
    first_draft: Tensor  # [B]
    max_drafts: int

    @classmethod
    def of(cls, num_drafts: Tensor, total: int, max_drafts: int) -> Places:
        ids = torch.arange(num_drafts.shape[0], device=num_drafts.device)
        first_draft = num_drafts.cumsum(0) - num_drafts
        request = ids.repeat_interleave(num_drafts, output_size=total)  # the known size spares a wait for the device
        draft = torch.arange(total, device=num_drafts.device)
        return cls(request, draft + request, draft - first_draft[request], first_draft + ids, first_draft, max_drafts)

    def leading(self, accept: Tensor) -> Tensor:
        """How many drafts of each request precede its first rejection. accept [D] bool; returns [B] int64."""
        grid = torch.zeros(self.first_row.shape[0], self.max_drafts, dtype=torch.int64, device=accept.device)
        grid[self.request, self.slot] = accept.to(torch.int64)
        return grid.cumprod(1).sum(1)

    def line_up(self, drafts: Tensor, accepted: Tensor, emitted: Tensor) -> Tensor:
        """The accepted drafts, the emitted token, then -1: [B, K + 1] int64."""
        tokens = torch.full((len(accepted), self.max_drafts + 1), -1, dtype=torch.int64, device=drafts.device)
        tokens[self.request, self.slot] = torch.where(self.slot < accepted[self.request], drafts, -1)
        return tokens.scatter_(1, accepted.unsqueeze(1), emitted.unsqueeze(1))


def _passes(
    logits: Tensor,
    drafts: Tensor,
    row: Tensor,
    proposal_logits: Tensor | None,
    one_hot: Tensor | None,
    uniform: Tensor,
) -> Tensor:
    """Whether each draft passes `uniform * q(d) < p(d)`: never if p(d) = 0, always if p(d) >= q(d). [D] bool."""
    return uniform * proposal_at(proposal_logits, one_hot, drafts) < probability_at(logits, row, drafts)


def probability_at(logits: Tensor, row: Tensor, drafts: Tensor) -> Tensor:
    """p of each draft: softmax(logits[row])[draft] as [D] float64. Each row has at most one draft."""
    of_row = torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device).scatter_(0, row, drafts)
    return _probability(logits, of_row)[row]


def proposal_at(proposal_logits: Tensor | None, one_hot: Tensor | None, drafts: Tensor) -> Tensor:
    """q of each draft, [D] float64."""
    if proposal_logits is None:
        return torch.ones(drafts.shape[0], dtype=torch.float64, device=drafts.device)
    q = _probability(proposal_logits, drafts)
    return q if one_hot is None else q.masked_fill(one_hot, 1.0)


def _probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """softmax(logits)[i, tokens[i]] as [N] float64; logits [N, V], tokens [N] int64."""
    rows = rows_of_piece(logits)
    pieces = zip(logits.split(rows), tokens.split(rows), strict=True)
    return torch.cat([x.log_softmax(-1).gather(1, t.unsqueeze(1)) for x, t in pieces]).squeeze(1).double().exp()


def _emit(
    logits: Tensor,
    drafts: Tensor,
    proposal_logits: Tensor | None,
    one_hot: Tensor | None,
    row: Tensor,
    draft: Tensor,
    rejected: Tensor,
    resample: Tensor,
) -> Tensor:
    """The token after the accepted drafts, from norm(max(p - q, 0)) where a draft was rejected, else from p.

    row [b], of `logits` to emit from; draft [b], the index of the rejected draft (any, where none was); rejected [b]
    bool; resample [b]. Returns [b] int64.
    """
    p = logits.index_select(0, row).softmax(-1)
    if drafts.shape[0] == 0:
        return draw(p, resample)
    draft = draft.clamp(max=drafts.shape[0] - 1)
    rest = p.clone()
    if proposal_logits is not None:
        soft = rejected if one_hot is None else rejected & ~one_hot[draft]
        q = proposal_logits.index_select(0, draft).softmax(-1)
        rest.sub_(q.masked_fill_(~soft.unsqueeze(1), 0.0)).clamp_(min=0)  # filled, not scaled: an unused q may be nan
    # A rejected draft has p(d) < q(d), so nothing of it is left. Set outright: for a one-hot q, and against rounding.
    token = drafts[draft].unsqueeze(1)
    rest.scatter_(1, token, rest.gather(1, token).masked_fill_(rejected.unsqueeze(1), 0.0))
    # Where p and q are equal up to rounding nothing may be left at all: p is the same distribution then.
    empty = rest.sum(-1, keepdim=True) <= 0
    return draw(torch.where(empty, p, rest), resample)


def check(
    logits: Tensor,
    drafts: Tensor,
    num_drafts: Tensor,
    max_drafts: int,
    proposal_logits: Tensor | None,
    greedy: Tensor | None,
    uniform: Tensor | None,
    resample: Tensor | None,
) -> None:
    total, batch = drafts.shape[0], num_drafts.shape[0]
    if logits.shape[0] != total + batch:
        raise ValueError(
            f"logits has {logits.shape[0]} rows: {total} drafts of {batch} requests need {total + batch} "
            "(one a draft and the certain row of each request)."
        )
    if total > batch * max_drafts:
        raise ValueError(f"max_drafts={max_drafts}: {batch} requests with {total} drafts need a larger one.")
    if proposal_logits is not None and proposal_logits.shape != (total, logits.shape[1]):
        raise ValueError(
            f"proposal_logits has shape {tuple(proposal_logits.shape)}: must be {(total, logits.shape[1])}, "
            "the logits each draft was drawn from, or None for one-hot proposals."
        )
    if greedy is not None and (uniform is None or resample is None):
        raise ValueError("uniform and resample are needed for sampled requests. Pass both, or greedy=None.")
