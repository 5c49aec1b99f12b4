"""Block verification in plain torch (arXiv 2403.10444, algorithm 2): exact, and accepts at least as many drafts.

Drafts are judged together rather than one by one. With r_i the joint ratio, capped after every draft, and S_i what of
the target is left behind draft i,

    r_0 = 1,  r_i = min(r_(i-1) p_i(d_i) / q_i(d_i), 1),   S_i = sum_x max(r_i p_(i+1)(x) - q_(i+1)(x), 0)
    h_i = S_i / (S_i + 1 - r_i) for i < k,   h_k = r_k

draft i is marked with probability h_i, all i independently, and everything up to the last mark is accepted; then one
token more is drawn from norm(max(r p - q, 0)) behind it, or from p behind all k. A greedy request is verified as in
`naive.verify`: under a one-hot p both rules are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm_idlm.kernels.draft.naive import draw
from vllm_idlm.kernels.verify import naive
from vllm_idlm.kernels.verify.naive import Verdict


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
    """Verify as `naive.verify` does, with the same arguments, shapes and errors, by the block rule.

    Cost: for sampled requests the probabilities of every verified row, where the standard rule needs one row's.
    """
    if greedy is None or not len(drafts):
        return naive.verify(
            logits, drafts, num_drafts, max_drafts=max_drafts, proposal_logits=proposal_logits, one_hot=one_hot,
            greedy=greedy, uniform=uniform, resample=resample,
        )  # fmt: skip
    naive.check(logits, drafts, num_drafts, max_drafts, proposal_logits, greedy, uniform, resample)
    plain = naive.verify(logits, drafts, num_drafts, max_drafts=max_drafts)  # as if all were greedy: argmaxes alone
    where = naive.Places.of(num_drafts, drafts.shape[0], max_drafts)
    rows = _Rows(logits, drafts, proposal_logits, one_hot, where)
    accepted, ratio = _judge(rows, num_drafts, uniform)
    left, p = rows.left(accepted, ratio)
    # Behind all drafts p itself; also where p and q are equal up to rounding and nothing is left.
    rejected = (accepted < num_drafts) & (left.sum(-1) > 0)
    emitted = draw(torch.where(rejected.unsqueeze(1), left, p), resample)
    emitted = torch.where(greedy, plain.tokens.gather(1, plain.accepted.unsqueeze(1)).squeeze(1), emitted)
    accepted = torch.where(greedy, plain.accepted, accepted)
    return Verdict(where.line_up(drafts, accepted, emitted), accepted)


class _Rows:
    """The target and the proposal of each request at one place of its row."""

    def __init__(self, logits, drafts, proposal_logits, one_hot, where) -> None:
        self.logits, self.drafts, self.where = logits, drafts, where
        self.proposal_logits, self.one_hot = proposal_logits, one_hot

    def ratio(self) -> Tensor:
        """[D] float64, p(d) / q(d) of every draft."""
        p = naive.probability_at(self.logits, self.where.row, self.drafts)
        return p / naive.proposal_at(self.proposal_logits, self.one_hot, self.drafts)

    def left(self, place: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """max(ratio p - q, 0) and p behind each request's first `place` drafts, [B, V]; q is any where none follows."""
        p = self.logits.index_select(0, self.where.first_row + place).softmax(-1)
        draft = (self.where.first_draft + place).clamp(max=len(self.drafts) - 1)
        left, token = p * ratio.float().unsqueeze(1), self.drafts[draft].unsqueeze(1)
        without = left.scatter(1, token, 0.0)  # a one-hot q takes its own token
        if self.proposal_logits is None:
            return without, p
        left = (left - self.proposal_logits.index_select(0, draft).softmax(-1)).clamp_(min=0)
        return left if self.one_hot is None else torch.where(self.one_hot[draft].unsqueeze(1), without, left), p


def _judge(rows: _Rows, num_drafts: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """[B] drafts accepted, and [B] float64 the ratio r at the last of them."""
    where, batch = rows.where, len(num_drafts)
    grid = torch.ones(2, batch, where.max_drafts, dtype=torch.float64, device=num_drafts.device)
    grid[:, where.request, where.slot] = torch.stack([rows.ratio(), uniform])
    ratio = kept = torch.ones(batch, dtype=torch.float64, device=num_drafts.device)
    accepted = torch.zeros_like(num_drafts)
    for place in range(where.max_drafts):
        live, last = place < num_drafts, place + 1 == num_drafts
        ratio = torch.where(live, (ratio * grid[0, :, place]).clamp(max=1), ratio)
        left = rows.left(torch.where(live & ~last, place + 1, 0), ratio)[0].sum(-1, dtype=torch.float64)
        chance = torch.where(last | (left + 1 - ratio <= 0), ratio, left / (left + 1 - ratio).clamp(min=1e-300))
        marked = live & (grid[1, :, place] < chance)
        accepted, kept = torch.where(marked, place + 1, accepted), torch.where(marked, ratio, kept)
    return accepted, kept
