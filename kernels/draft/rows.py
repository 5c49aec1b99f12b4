"""What `draft_rows` takes and gives, and its plain torch form: the oracle of `triton.py`.

As `naive.propose`, for batches whose mask rows only the device knows, with noise drawn by counter. The proposal is
`q = softmax(logits / temperature)` without the mask token; top-k, top-p and the rest are left to verification, which is
exact for any q that the draft was really drawn from.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from vllm_idlm.kernels.noise import DRAFT
from vllm_idlm.kernels.noise import naive as noise


class MaskRows(NamedTuple):
    """The mask rows of B requests, m = n - 1 places each, of which `count` are there; R request slots."""

    logits: Tensor  # [N, V] any float dtype, of the forward; NaN counts as -inf
    first_row: Tensor  # [B] int, each request's first mask row in `logits`; its rows follow each other
    count: Tensor  # [B] int, how many of them to draw from, 0 <= count <= m
    position: Tensor  # [B] int64, place in the sequence of the first mask row: the noise's counter
    slot: Tensor  # [B] int64, index into the tensors by request slot
    temperature: Tensor  # [R] float32, 0: greedy
    seed: Tensor  # [R] int64
    mask_token_id: int


def draft_rows(rows: MaskRows, drafts: Tensor, proposal: Tensor | None) -> None:
    """Draw one draft from each mask row, into drafts [B, m] int64; other entries become the mask token.

    proposal: [R, m, V] in the logits' dtype; the rows that sampled requests drew from are kept there, before
    temperature and without the mask token, for verification. None: drafts are argmaxes, and nothing is kept.
    """
    most = drafts.shape[1]
    drafts.fill_(rows.mask_token_id)
    index = torch.arange(rows.logits.shape[-1], device=rows.logits.device)
    temperature = rows.temperature[rows.slot].unsqueeze(1)
    for place in range(most):
        live = place < rows.count
        logits = rows.logits[(rows.first_row.long() + place).where(live, 0)].clone()
        logits[:, rows.mask_token_id] = float("-inf")
        score = torch.where(logits.isnan(), float("-inf"), logits.float())
        if proposal is not None:
            kept = (live & (temperature.squeeze(1) != 0)).nonzero().squeeze(1)
            proposal[rows.slot[kept], place] = logits[kept].to(proposal.dtype)
            # The draft must come from the very q that is kept, so from its logits as they are rounded there.
            score = torch.where(temperature == 0, score, score.to(proposal.dtype).float())
            places = (rows.position + place).unsqueeze(1)
            race = noise.exponential(rows.seed[rows.slot].unsqueeze(1), index, places, DRAFT).log()
            score = torch.where(temperature == 0, score, score / torch.where(temperature == 0, 1, temperature) - race)
        drafts[:, place] = torch.where(live, score.argmax(-1), rows.mask_token_id)
