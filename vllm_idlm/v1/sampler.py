"""Verification in Model Runner V1: vLLM's sampling options on every verified row, then ISD's own exact rule.

Differs from vLLM's RejectionSampler: rows of mask slots are never verified, sampled from or reported; every option of
plain decoding applies to every verified row (also min_p, logit_bias and thinking budgets); the certain token is a
row more, not a separate pass; only the row that a request emits from is turned into probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from vllm_idlm.kernels.verify import Verdict, block, verify
from vllm_idlm.proposers.state import Row
from vllm_idlm.v1 import noise
from vllm_idlm.v1.options import Rows, as_plain_rows, needs_processing, over_rows

if TYPE_CHECKING:
    from vllm_idlm.v1.proposer import ISDProposer

_LOGPROB_MODES = ("raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits")


class ISDSampler(nn.Module):
    """Takes the place of `runner.rejection_sampler`; with a speculative configuration vLLM calls it in every step."""

    def __init__(self, sampler: Any, isd: ISDProposer) -> None:
        super().__init__()
        self.sampler = sampler
        self.isd = isd
        if sampler.logprobs_mode not in _LOGPROB_MODES:
            raise NotImplementedError(
                f"logprobs_mode {sampler.logprobs_mode!r} under ISD; allowed are {_LOGPROB_MODES}"
            )
        self._logits: torch.Tensor | None = None  # of the last forward, for the proposals
        self._mask_rows: list[np.ndarray] = []  # per request, its mask rows in those logits

    def forward(self, metadata: Any, draft_probs: Any, logits: torch.Tensor, sampling_metadata: Any) -> SamplerOutput:
        """Verify the drafts of every request of the batch.

        metadata: vLLM's SpecDecodeMetadata; logits: [sum(slots + 1), vocab], the rows of each request consecutive;
        sampling_metadata: vLLM's. Returns sampled_token_ids [num_reqs, most drafts + 1] int32, -1 where nothing was
        emitted. `draft_probs` is vLLM's and always None here: q is in the rows' own records.
        """
        with self.isd.stats.timed():
            return self._forward(metadata, logits, sampling_metadata)

    def _forward(self, metadata: Any, logits: torch.Tensor, sampling: Any) -> SamplerOutput:
        if not any(metadata.num_draft_tokens) and not sampling.generators:  # one row a request: plain decoding
            return self.sampler(logits=logits, sampling_metadata=sampling)  # (seeds draw their numbers our way always)
        rows = self._rows(metadata)
        verified, self._mask_rows = _split(rows, metadata.num_draft_tokens)
        self._logits = logits
        drafts = [row.drafts for row in rows]
        index = torch.from_numpy(verified).to(logits.device, non_blocking=True)
        anchors = logits.index_select(0, index).to(torch.float32)  # [R, vocab], ours to change
        layout = Rows(drafts, logits.device)
        raw = anchors.clone() if self._reports(sampling, "raw") else None
        plain = as_plain_rows(sampling, layout) if needs_processing(sampling) else None
        if plain is not None:
            anchors = self.sampler.apply_logits_processors(anchors, plain, False)
        if not sampling.all_greedy:
            anchors = _constrain(anchors, sampling, layout)
        verdict = self._verify(anchors, rows, sampling)
        reported = raw if raw is not None else anchors
        return SamplerOutput(
            sampled_token_ids=verdict.tokens.to(torch.int32),
            logprobs_tensors=self._logprobs(reported, verdict, drafts, sampling),
        )

    def _rows(self, metadata: Any) -> list[Row]:
        rows = self.isd.batch_rows()
        slots = metadata.num_draft_tokens
        if len(rows) == len(slots) and all(row.width <= s for row, s in zip(rows, slots, strict=True)):
            return rows
        # vLLM's memory profiling: no requests, made-up drafts. Use as much memory as a full step would.
        return [Row(drafts=[0] * (s - s // 2), masks=s // 2) for s in slots]

    def _verify(self, logits: torch.Tensor, rows: list[Row], sampling: Any) -> Verdict:
        counts = [len(row.drafts) for row in rows]
        device = logits.device
        drafts = torch.tensor([d for row in rows for d in row.drafts], dtype=torch.int64, device=device)
        options: dict[str, Any] = {}
        if not sampling.all_greedy:
            options["greedy"] = sampling.temperature == 0
            generators = [sampling.generators.get(i) for i in range(len(rows))]
            options["uniform"] = noise.uniform(counts, generators, device)
            options["resample"] = noise.uniform([1] * len(rows), generators, device)
            options |= _proposals(rows, logits)
        num_drafts = torch.tensor(counts, device=device)
        rule = block.verify if self.isd.settings.verify == "block" else verify
        if (alpha := self.isd.settings.lossy_alpha) < 1 and "uniform" in options:
            options["uniform"] = options["uniform"] * alpha  # u alpha q < p: lossy, and asked for by name
        return rule(logits, drafts, num_drafts, max_drafts=max(counts), **options)

    def mask_logits(self, groups: Sequence[tuple[int, int, int]]) -> torch.Tensor:
        """[M, vocab] float32 copies of the last forward's logits at groups of masks, in their order.

        groups: (request, the group's place among the request's mask rows, masks).
        """
        index = torch.from_numpy(np.concatenate([self._mask_rows[i][at : at + count] for i, at, count in groups]))
        return self._logits.index_select(0, index.to(self._logits.device)).to(torch.float32)

    def _reports(self, sampling: Any, kind: str) -> bool:
        wanted = sampling.max_num_logprobs is not None or bool(sampling.logprob_token_ids)
        return wanted and self.sampler.logprobs_mode.startswith(kind)

    def _logprobs(self, logits: torch.Tensor, verdict: Verdict, drafts: list, sampling: Any) -> LogprobsTensors | None:
        """Log-probabilities of the emitted tokens, laid out as `verdict.tokens`; vLLM drops the rows of the padding."""
        if sampling.max_num_logprobs is None and not sampling.logprob_token_ids:
            return None
        width = verdict.tokens.shape[1]
        counts = np.array([len(own) + 1 for own in drafts])
        starts = np.cumsum(counts) - counts
        places = starts[:, None] + np.minimum(np.arange(width), counts[:, None] - 1)
        rows = logits[torch.from_numpy(places.ravel()).to(logits.device)]
        scores = self.sampler.compute_logprobs(rows) if self.sampler.logprobs_mode.endswith("logprobs") else rows
        tokens = verdict.tokens.flatten().clamp(min=0)
        if sampling.logprob_token_ids:
            wanted = {i * width + j: ids for i, ids in sampling.logprob_token_ids.items() for j in range(width)}
            return self.sampler.gather_specific_token_logprobs(scores, wanted, tokens)
        return self.sampler.gather_logprobs(scores, sampling.max_num_logprobs, tokens)


def _split(rows: Sequence[Row], slots: Sequence[int]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Indices into the logits: [R] of the verified rows (x, d1..dk), and each request's mask rows.

    slots: how many slots vLLM scheduled behind each pending token; a row may use fewer than that (a lost record).
    """
    ends = np.cumsum(np.asarray(slots) + 1)
    starts = ends - np.asarray(slots) - 1
    verified = [start + np.arange(len(row.drafts) + 1) for start, row in zip(starts, rows, strict=True)]
    masks = [start + 1 + len(row.drafts) + np.arange(row.all_masks) for start, row in zip(starts, rows, strict=True)]
    return np.concatenate(verified), masks


def _constrain(logits: torch.Tensor, sampling: Any, layout: Rows) -> torch.Tensor:
    """Temperature, min_p, top-k and top-p of each row's request, in plain decoding's order. In place."""
    temperature = sampling.temperature[layout.index]
    logits = logits.div_(torch.where(temperature == 0, 1.0, temperature).unsqueeze(1))
    for processor in sampling.logitsprocs.argmax_invariant:
        logits = over_rows(processor, layout).apply(logits)
    top_k = sampling.top_k[layout.index] if sampling.top_k is not None else None
    top_p = sampling.top_p[layout.index] if sampling.top_p is not None else None
    return apply_top_k_top_p(logits, top_k, top_p)


def _proposals(rows: Sequence[Row], logits: torch.Tensor) -> dict[str, Any]:
    """The q of all drafts as `verify` takes it: [D, vocab] logits, or which drafts are one-hot proposals."""
    drafted = [row for row in rows if row.drafts]
    if all(row.proposal is None for row in drafted):
        return {"proposal_logits": None}
    if all(row.proposal is not None for row in drafted):
        return {"proposal_logits": torch.cat([row.proposal for row in drafted])}
    kept = [
        row.proposal if row.proposal is not None else logits.new_zeros(len(row.drafts), logits.shape[1])
        for row in drafted
    ]
    one_hot = [row.proposal is None for row in drafted for _ in row.drafts]
    return {"proposal_logits": torch.cat(kept), "one_hot": torch.tensor(one_hot, device=logits.device)}
