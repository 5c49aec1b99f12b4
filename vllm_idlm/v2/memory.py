"""What ISD's heaviest step takes beside the forward itself, for vLLM's profile of memory: above all, logits.

vLLM profiles the sampling of one row a request; ISD has logits in every row of every request. Those rows that vLLM's
processing of options makes float32 copies of are bounded by vLLM's own limit for a chunk (`v2.sampler.chunks`).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import get_max_chunk_logits

from vllm_idlm.v2 import warm

if TYPE_CHECKING:
    from vllm_idlm.v2.speculator import ISDSpeculator

log = logging.getLogger("vllm.idlm")  # below vLLM's logger, so that it is printed as vLLM's lines are


class Heaviest(NamedTuple):
    """Rows of V logits each in a step that has as many as there can be."""

    rows: int  # of the forward, in the dtype of the model's head
    chunk: int  # of these, copied once in that dtype and once in float32 at a time

    @classmethod
    def of(cls, requests: int, width: int, n: int, tokens: int, vocabulary: int) -> Heaviest:
        """Of at most so many requests with `width` rows each, of which n are verified, and tokens, in a step."""
        rows = min(requests * width, tokens)
        limit = max(get_max_chunk_logits(vocabulary), n)  # a request stays whole
        return cls(rows, min(requests * n, rows, limit))

    def bytes(self, vocabulary: int, size: int) -> int:
        """Of all of them, with `size` bytes a logit."""
        return vocabulary * (self.rows * size + self.chunk * (size + 4))


@torch.inference_mode()
def heaviest_step(isd: ISDSpeculator, hidden: Tensor) -> None:
    """Take what that step takes, and free it. hidden: as `ISDSpeculator.profile`."""
    runner, settings = isd.runner, isd.settings
    vocabulary = runner.model_config.get_vocab_size()
    requests, tokens = runner.max_num_reqs, runner.max_num_tokens
    step = Heaviest.of(requests, 1 + settings.slots, settings.n, tokens, vocabulary)
    logits = warm.some_logits(isd, step.rows, hidden)
    some = logits[torch.arange(step.chunk, device=logits.device)]
    processed = some.float() if some.dtype != torch.float32 else some.clone()
    log.info(
        "ISD: a step of %d requests has up to %d rows of %d logits: %.1f MiB, with %d rows that options are applied to",
        requests, step.rows, vocabulary, step.bytes(vocabulary, logits.element_size()) / 2**20, len(processed),
    )  # fmt: skip
