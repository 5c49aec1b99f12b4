"""Verification in Model Runner V2: the raw logits go to the verify kernel; options beyond temperature by vLLM's chain.

Differs from vLLM's RejectionSampler: mask rows are never verified, sampled from or reported; a request without options
beyond its temperature is verified from the logits as they are, without a float32 copy; the others in the same batch get
vLLM's own processing on their verified rows alone. Under a grammar a draft that breaks it has p = 0 and is rejected and
resampled like any other (vLLM draws from p there, which is not exact).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_idlm.kernels.verify import Rows, verify_rows
from vllm_idlm.kernels.verify import RowsVerdict as Verdict

if TYPE_CHECKING:
    from vllm_idlm.v2.speculator import ISDSpeculator, Step


class ISDRejectionSampler:
    """Takes the place of `runner.rejection_sampler`; called in steps with slots, and by `SeededSampler`."""

    enable_adaptive_verification = False  # asked for by vLLM's warm-up of kernels

    def __init__(self, runner: Any, isd: ISDSpeculator) -> None:
        self.sampler = runner.sampler
        self.req_states = runner.req_states
        self.isd = isd
        self.general = np.zeros(self.req_states.max_num_reqs, dtype=bool)  # by slot: options beyond the temperature
        self.seeded = np.zeros(self.req_states.max_num_reqs, dtype=bool)  # by slot
        self._watch(self.sampler)

    def _watch(self, sampler: Any) -> None:
        """Learn from vLLM's own answers which requests need which processing."""
        states = sampler.sampling_states
        add = states.add_request

        def add_request(slot: int, params: Any) -> bool:
            found = add(slot, params)
            all_tokens = params.top_k <= 0 or params.top_k >= states.vocab_size
            truncates = params.min_p != 0.0 or params.top_p != 1.0 or not all_tokens
            self.general[slot] = params.temperature != 0.0 and truncates
            self.seeded[slot] = params.temperature != 0.0 and params.seed is not None
            return found

        def noted(original: Any) -> Any:
            def add_request(slot: int, params: Any) -> bool:
                found = original(slot, params)
                self.general[slot] |= bool(found)
                return found

            return add_request

        states.add_request = add_request  # vLLM calls it first
        for processor in (sampler.thinking_budget_state, *sampler.logits_processors):
            processor.add_request = noted(processor.add_request)

    def __call__(
        self, logits: Tensor, input_batch: Any, draft_logits: Tensor | None = None, invalid_drafts: Tensor | None = None
    ) -> SamplerOutput:
        """Verify the drafts of every request of the batch.

        logits: [rows, V], the rows of each request consecutive, grammar masks applied. The other arguments are vLLM's:
        q and the number of drafts are in our own state. Returns [B, n] tokens, of which `num_sampled` are emitted.
        """
        with self.isd.stats.timed():
            step = self.isd.step
            step.logits = logits if input_batch.num_draft_tokens else None
            nans = get_num_nans(logits) if self.sampler.compute_nans else None
            wants = self.sampler.get_logprobs_dims(input_batch.idx_mapping_np)
            whole = wants is not None and self.sampler.logprobs_mode in PROCESSED_LOGPROBS_MODES
            chosen = (
                np.arange(input_batch.num_reqs) if whole else np.flatnonzero(self.general[input_batch.idx_mapping_np])
            )
            verified = _Verified.of(input_batch, self.isd.settings.n) if wants is not None or len(chosen) else None
            processed, processed_first = self._process(logits, input_batch, verified, chosen)
            verdict = verify_rows(self._rows(step, logits, processed, processed_first))
            if self.isd.synthetic is not None:
                verdict = _synthetic(verdict, step, self.isd.synthetic)
            reported = None
            if wants is not None:
                rows = processed if whole else logits[async_tensor_h2d(verified.rows, device=logits.device)]
                reported = self._logprobs(rows, verified, input_batch, verdict.tokens, wants)
            num_sampled, num_rejected = get_num_sampled_and_rejected(
                verdict.emitted,
                input_batch.seq_lens,
                input_batch.cu_num_logits,
                input_batch.idx_mapping,
                self.req_states.prefill_len.gpu,
            )
        return SamplerOutput(
            sampled_token_ids=verdict.tokens,
            logprobs_tensors=reported,
            num_nans=nans,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )

    def _rows(self, step: Step, logits: Tensor, processed: Tensor | None, processed_first: Tensor | None) -> Rows:
        batch, states = step.batch, self.sampler.sampling_states
        return Rows(
            logits,
            batch.cu_num_logits[:-1],
            step.drafts,
            self.req_states.draft_tokens[batch.idx_mapping, : self.isd.settings.masks].contiguous(),
            step.position,
            batch.idx_mapping,
            states.temperature.gpu,
            states.seeds.gpu,
            self.isd.proposal,
            processed,
            processed_first,
        )

    def _process(
        self, logits: Tensor, batch: Any, verified: _Verified | None, chosen: np.ndarray
    ) -> tuple[Tensor | None, Tensor | None]:
        """vLLM's processing on the verified rows of the requests `chosen`, and where each one's rows begin in it."""
        if verified is None or not len(chosen):
            return None, None
        device = logits.device
        own = verified.take(chosen)
        slots = batch.idx_mapping_np[chosen]
        rows = async_tensor_h2d(own.rows, device=device)
        at = batch.logits_indices[rows]
        processed = self.sampler.apply_sampling_params(
            logits[rows],
            async_tensor_h2d(np.repeat(slots, own.counts), device=device, dtype=torch.int64),
            async_tensor_h2d(slots, device=device, dtype=torch.int64),
            slots,
            batch.positions[at],
            batch.input_ids[at],
            async_tensor_h2d(own.places, device=device, dtype=torch.int32),
            batch.seq_lens_cpu_upper_bound.numpy()[chosen],
        )
        first = np.full(batch.num_reqs, -1, dtype=np.int64)
        first[chosen] = np.cumsum(own.counts) - own.counts
        return processed.float(), async_tensor_h2d(first, device=device)

    def _logprobs(self, logits: Tensor, verified: _Verified, batch: Any, tokens: Tensor, wants: tuple[int, int]) -> Any:
        """Log-probabilities of the emitted tokens; vLLM takes the first `num_sampled` rows of each request."""
        device = logits.device
        owner = async_tensor_h2d(np.repeat(np.arange(batch.num_reqs), verified.counts), device=device)
        place = async_tensor_h2d(verified.places, device=device)
        ends = np.concatenate([[0], np.cumsum(verified.counts)])
        return compute_topk_scores(
            logits,
            wants[0],
            tokens[owner, place].clamp(min=0),
            ends.tolist() if ends[-1] != batch.num_reqs else None,
            logprob_token_ids_state=self.sampler.logprob_token_ids_state,
            expanded_idx_mapping=batch.idx_mapping[owner],
            max_per_req_token_ids=wants[1],
            logits_mode=self.sampler.logprobs_mode in ("raw_logits", "processed_logits"),
        )


class SeededSampler:
    """Takes the place of `runner.sampler`, which vLLM calls in steps without any slots, and is it in all else.

    Our noise is not vLLM's. A request with a seed has ours in every step: otherwise its text would depend on whether
    others in the batch had slots.
    """

    def __init__(self, sampler: Any, verifier: ISDRejectionSampler) -> None:
        self._sampler, self._verifier = sampler, verifier

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def __call__(self, logits: Tensor, input_batch: Any) -> SamplerOutput:
        """As vLLM's Sampler."""
        ours = self._verifier.isd.step is not None and self._verifier.seeded[input_batch.idx_mapping_np].any()
        return (self._verifier if ours else self._sampler)(logits, input_batch)


def _synthetic(verdict: Verdict, step: Step, rate: float) -> Verdict:
    """Benchmarks only: as many drafts accepted as chance says, the tokens of no meaning. Dummy weights accept none."""
    batch, width = verdict.tokens.shape
    place = torch.arange(width - 1, device=verdict.tokens.device)
    passes = (torch.rand(batch, width - 1, device=place.device) < rate) & (place < step.drafts.unsqueeze(1))
    return Verdict(verdict.tokens.clamp(min=0), (passes.long().cumprod(1).sum(1) + 1).int())


class _Verified(NamedTuple):
    """Rows that may be verified, of each request: those of x, d1..d(n-1), as far as scheduled. All on the host."""

    counts: np.ndarray  # [B] rows of each request
    rows: np.ndarray  # [sum] their indices among the rows with logits
    places: np.ndarray  # [sum] place in the request's row, 0 is x

    @classmethod
    def of(cls, batch: Any, n: int) -> _Verified:
        starts = batch.cu_num_logits_np[:-1].astype(np.int64)
        return cls._at(starts, np.minimum(np.diff(batch.cu_num_logits_np), n).astype(np.int64))

    @classmethod
    def _at(cls, starts: np.ndarray, counts: np.ndarray) -> _Verified:
        places = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return cls(counts, np.repeat(starts, counts) + places, places)

    def take(self, requests: np.ndarray) -> _Verified:
        """Those of some requests."""
        firsts = (np.cumsum(self.counts) - self.counts)[requests]
        return self._at(self.rows[firsts], self.counts[requests])
