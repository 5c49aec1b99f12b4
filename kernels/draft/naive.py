"""Drafting in plain torch: draw each draft from the proposal `q`, and hand back `q` for verification.

Speculative sampling (arXiv 2211.17192) is exact for any proposal, provided the draft was drawn from the very `q` that
verification divides by. `propose` therefore returns the logits it drew from, with the options already in them:

    q = softmax(top_p(top_k(ban_mask(logits) / temperature)))

A draw inverts the cumulative distribution at one uniform number, in float64: an exponential race (Gumbel-max) is
exact too, but on a CPU its noise for a whole row costs several times what all the rest does. The noise is the caller's,
so the same noise gives the same drafts whatever else is in the batch.

Works on any device, without a loop over rows. On CUDA nothing waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_CANDIDATES = (256, 4096)  # how many of the largest logits are tried before whole rows are sorted for top-p
# Elements of a temporary. Rows are taken in pieces of about this size: on a CPU 4 MiB stay in the cache and are served
# again by the allocator, where [R, V] at once would be fresh pages each step; a GPU wants few and large launches.
_PIECE_CPU, _PIECE_GPU = 1 << 20, 1 << 26


class Proposal(NamedTuple):
    """Drafts and the distribution they were drawn from."""

    drafts: Tensor  # [M] int64
    logits: Tensor | None  # [M, V] float32, q = softmax(logits); None: the drafts are argmaxes, q is one-hot


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Draw an index of each row with probability proportional to its weight.

    weights [B, V] float32 >= 0, uniform [B] float64 in [0, 1); returns [B] int64: the first index whose cumulative
    weight exceeds `uniform` times the row's sum, in float64. An index of weight 0 is never drawn unless the whole row
    is 0 (then it is the last one).
    """
    total = weights.cumsum(-1, dtype=torch.float64)
    whole = total[:, -1:]
    # Rounding may lift the product to the whole sum, which no index exceeds.
    target = torch.minimum(uniform.unsqueeze(1) * whole, torch.nextafter(whole, torch.zeros_like(whole)))
    return torch.searchsorted(total, target, right=True).squeeze(1).clamp_(max=weights.shape[1] - 1)


def rows_of_piece(logits: Tensor) -> int:
    """How many rows of logits [.., V] to take at a time, at least 1."""
    return max(1, (_PIECE_CPU if logits.is_cpu else _PIECE_GPU) // logits.shape[1])


def confidence(logits: Tensor, drafts: Tensor) -> Tensor:
    """q of each draft under its own row of `logits` [M, V]: [M] float32."""
    return (logits.gather(1, drafts.unsqueeze(1)).squeeze(1) - logits.logsumexp(1)).exp()


def propose(
    logits: Tensor,
    *,
    mask_token_id: int,
    greedy: Tensor | None = None,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    uniform: Tensor | None = None,
) -> Proposal:
    """Draw one draft from each row of mask-slot logits. `logits` is overwritten and returned as `q`'s logits.

    logits:         [M, V] float32, of the mask slots, M >= 0.
    mask_token_id:  banned from q (logit -inf): a draft is never the mask token. `p` is not touched by this.
    greedy:         [M] bool, rows that take the argmax (lowest index at a tie); None: all rows, and `logits` of the
                    result is None (a one-hot q). The other options are then not read.
    temperature:    [M] float32 > 0 (ignored at greedy rows), or None for 1.
    top_k:          [M] int, keeps the k largest and every tie with the k-th; k <= 0 or k >= V keeps all; None: no row.
    top_p:          [M] float32 in (0, 1], keeps the fewest largest whose sum reaches p, at least one, after top_k;
                    None: no row.
    uniform:        [M] float64 in [0, 1), needed unless greedy is None; independent of verification's noise.

    Memory: two temporaries of one piece of rows (4 MiB each on a CPU, 256 MiB on a GPU); top_k and top_p need up to
    three [M, V] float32 more. Raises ValueError for a mask token outside the vocabulary or for missing noise.
    """
    _check(logits, mask_token_id, greedy, uniform)
    logits[:, mask_token_id] = float("-inf")
    if greedy is None:
        return Proposal(logits.argmax(-1), None)
    best = logits.argmax(-1)
    if temperature is not None:
        logits.div_(temperature.masked_fill(greedy, 1.0).to(logits.dtype).unsqueeze(1))
    if top_k is not None:
        keep_top_k(logits, top_k)
    if top_p is not None:
        keep_top_p(logits, top_p)
    rows = rows_of_piece(logits)
    pieces = zip(logits.split(rows), uniform.split(rows), strict=True)
    drawn = torch.cat([draw(piece.softmax(-1), noise) for piece, noise in pieces])
    return Proposal(torch.where(greedy, best, drawn), logits)


def keep_top_k(logits: Tensor, top_k: Tensor) -> Tensor:
    """Set to -inf, in place, what is smaller than the k-th largest of its row. logits [M, V], top_k [M] int."""
    rows, vocab = logits.shape
    if rows == 0:
        return logits
    off = (top_k <= 0) | (top_k >= vocab)
    k = top_k.to(torch.int64).masked_fill(off, 1)
    # The greatest k is known for free on the CPU only; elsewhere reading it would wait for the device.
    largest = logits.topk(int(k.max()), -1).values if logits.is_cpu else logits.sort(-1, descending=True).values
    kth = largest.gather(1, k.unsqueeze(1) - 1).masked_fill_(off.unsqueeze(1), float("-inf"))
    return logits.masked_fill_(logits < kth, float("-inf"))


def keep_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """Set to -inf, in place, all but the fewest largest probabilities that reach p; the largest always stays.

    logits [M, V] float32, top_p [M] float32. At a tie for the last place the sort decides, as in vLLM.
    """
    rows, vocab = logits.shape
    if rows == 0:
        return logits
    off = (top_p >= 1).unsqueeze(1)  # a float32 sum can reach 1 before its last term, so p = 1 is not left to the sum
    bound = top_p.unsqueeze(1)
    probabilities = logits.softmax(-1)
    # A few candidates mostly reach p; whether they do can be asked for free on the CPU only.
    for count in [*(c for c in _CANDIDATES if logits.is_cpu and c < vocab), vocab]:
        kept, index, reached = _candidates(probabilities, bound, count)
        if count == vocab or bool((reached | off).all()):
            break
    keep = off.repeat(1, vocab).scatter_(1, index, kept | off)
    return logits.masked_fill_(~keep, float("-inf"))


def _candidates(probabilities: Tensor, bound: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the `count` largest: which are kept [M, count], their tokens [M, count], and whether p is reached [M, 1]."""
    largest, index = probabilities.topk(count, -1)
    total = largest.cumsum(-1)
    kept = total - largest < bound
    kept[:, 0] = True
    return kept, index, total[:, -1:] >= bound


def _check(logits: Tensor, mask_token_id: int, greedy: Tensor | None, uniform: Tensor | None) -> None:
    vocab = logits.shape[-1]
    if not 0 <= mask_token_id < vocab:
        raise ValueError(
            f"mask_token_id={mask_token_id}: must be in 0..{vocab - 1} (the logits' vocabulary). "
            "Set it to the token the model was trained to fill in."
        )
    if greedy is not None and uniform is None:
        raise ValueError("uniform=None: sampled drafts need [M] uniform noise. Pass it, or greedy=None.")
