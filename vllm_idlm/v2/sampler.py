"""Verification in Model Runner V2: the raw logits go to the verify kernel; options beyond temperature by vLLM's chain.

Differs from vLLM's RejectionSampler: mask rows are never verified, sampled from or reported; a request without options
beyond its temperature is verified from the logits as they are, without a float32 copy; the others in the same batch get
vLLM's own processing on their verified rows alone. Under a grammar a draft that breaks it has p = 0 and is rejected and
resampled like any other (vLLM draws from p there, which is not exact).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import get_max_chunk_logits

from vllm_idlm.kernels.verify import Rows, verify_rows
from vllm_idlm.kernels.verify import RowsVerdict as Verdict
from vllm_idlm.patching import replace

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

        def add_request(req_idx: int, sampling_params: Any) -> bool:  # vLLM's names
            needs_processing, params = add(req_idx, sampling_params), sampling_params
            all_tokens = params.top_k <= 0 or params.top_k >= states.vocab_size
            truncates = params.min_p != 0.0 or params.top_p != 1.0 or not all_tokens
            self.general[req_idx] = params.temperature != 0.0 and truncates
            self.seeded[req_idx] = params.temperature != 0.0 and params.seed is not None
            return needs_processing

        def noted(original: Any) -> Any:
            def add_request(req_idx: int, sampling_params: Any) -> bool:
                needs_processing = original(req_idx, sampling_params)
                self.general[req_idx] |= bool(needs_processing)
                return needs_processing

            return add_request

        replace("object-v2-samplers", states, "add_request", add_request)  # vLLM calls it first
        for processor in (sampler.thinking_budget_state, *sampler.logits_processors):
            replace("object-v2-samplers", processor, "add_request", noted(processor.add_request))

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
            verdict, reported = self._verify(step, logits)
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

    def _verify(self, step: Step, logits: Tensor) -> tuple[Verdict, Any]:
        """The verdict and the log-probabilities of a step, in parts so small that vLLM's processing has the room."""
        batch = step.batch
        wants = self.sampler.get_logprobs_dims(batch.idx_mapping_np)
        chosen = self.general[batch.idx_mapping_np]
        if wants is not None and self._reports_processed():
            chosen = np.ones_like(chosen)
        rows = self.rows(step, logits)
        if wants is None and not chosen.any():
            return self._judge(step, rows), None
        verified = _Verified.of(batch, self.isd.settings.n)
        copied = verified.counts if wants is not None else np.where(chosen, verified.counts, 0)
        verdicts, reports = [], []
        for part in chunks(copied, get_max_chunk_logits(logits.shape[1])):
            verdict, reported = self._verify_part(step, rows, verified.of_part(part), chosen[part], part, wants)
            verdicts.append(verdict)
            reports.append(reported)
        if wants is None:
            return _joined(verdicts), None
        ends = np.concatenate([[0], np.cumsum(verified.counts)])
        return _joined(verdicts), LogprobsTensors.cat(reports, ends.tolist() if ends[-1] != batch.num_reqs else None)

    def _verify_part(
        self, step: Step, rows: Rows, verified: _Verified, chosen: np.ndarray, part: slice, wants: Any
    ) -> tuple[Verdict, Any]:
        """As `_verify`, of the requests of `part`, for which `verified` and `chosen` are."""
        processed, first = self._process(rows.logits, step.batch, verified, chosen, part)
        mine = _part(rows, part)._replace(processed=processed, processed_first=first)
        verdict = self._judge(step, mine, part)
        if wants is None:
            return verdict, None
        if not self._reports_processed():
            del mine, processed  # before the next copy is made
            processed = rows.logits[async_tensor_h2d(verified.rows, device=rows.logits.device)]
        return verdict, self._logprobs(processed, verified, step.batch.idx_mapping[part], verdict.tokens, wants)

    def _judge(self, step: Step, rows: Rows, part: slice = slice(None)) -> Verdict:
        verdict = verify_rows(rows)
        rate = self.isd.synthetic
        return verdict if rate is None else _synthetic(verdict, step.drafts[part], rate)

    def _reports_processed(self) -> bool:
        """Whether log-probabilities are those of logits with all options in them."""
        return self.sampler.logprobs_mode in PROCESSED_LOGPROBS_MODES

    def rows(
        self, step: Step, logits: Tensor, processed: Tensor | None = None, processed_first: Tensor | None = None
    ) -> Rows:
        """What `verify_rows` takes, of all requests of a step."""
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
        self, logits: Tensor, batch: Any, verified: _Verified, chosen: np.ndarray, part: slice
    ) -> tuple[Tensor | None, Tensor | None]:
        """vLLM's processing on the verified rows of the requests `chosen` of `part`, and where in it each one's begin.

        The second is [requests of the part], -1 for those that were not chosen.
        """
        if not chosen.any():
            return None, None
        device = logits.device
        own = verified.take(np.flatnonzero(chosen))
        slots = batch.idx_mapping_np[part][chosen]
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
            batch.seq_lens_cpu_upper_bound.numpy()[: batch.num_reqs][part][chosen],
        )
        first = np.full(len(chosen), -1, dtype=np.int64)
        first[chosen] = np.cumsum(own.counts) - own.counts
        return processed.float(), async_tensor_h2d(first, device=device)

    def _logprobs(
        self, logits: Tensor, verified: _Verified, slots: Tensor, tokens: Tensor, wants: tuple[int, int]
    ) -> LogprobsTensors:
        """Log-probabilities of the emitted tokens; vLLM takes the first `num_sampled` rows of each request.

        logits: of the rows of `verified`; slots, tokens: of its requests.
        """
        device = logits.device
        owner = async_tensor_h2d(np.repeat(np.arange(len(verified.counts)), verified.counts), device=device)
        place = async_tensor_h2d(verified.places, device=device)
        return compute_topk_scores(
            logits,
            wants[0],
            tokens[owner, place].clamp(min=0),
            None,
            logprob_token_ids_state=self.sampler.logprob_token_ids_state,
            expanded_idx_mapping=slots[owner],
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


def chunks(rows: np.ndarray, most: int) -> Iterator[slice]:
    """Split requests with so many rows each, [B], into runs of at most `most` rows; one with more is a run by itself.

    vLLM's limit is `get_max_chunk_logits`: 1 GiB of float32 logits.
    """
    ends, start = np.cumsum(rows), 0
    while start < len(rows):
        before = ends[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + most, side="right")))
        yield slice(start, end)
        start = end


def _part(rows: Rows, part: slice) -> Rows:
    """Those of some requests. Copies: a slice may begin anywhere, and Triton compiles anew for addresses that are not
    multiples of 16."""
    if part.start == 0 and part.stop == len(rows.slot):
        return rows
    by_request = ("first_row", "num_drafts", "drafts", "position", "slot")
    return rows._replace(**{name: getattr(rows, name)[part].clone() for name in by_request})


def _joined(verdicts: list[Verdict]) -> Verdict:
    if len(verdicts) == 1:
        return verdicts[0]
    return Verdict(*(torch.cat(parts) for parts in zip(*verdicts, strict=True)))


def _synthetic(verdict: Verdict, drafts: Tensor, rate: float) -> Verdict:
    """Benchmarks only: as many drafts accepted as chance says, the tokens of no meaning. Dummy weights accept none."""
    batch, width = verdict.tokens.shape
    place = torch.arange(width - 1, device=verdict.tokens.device)
    passes = (torch.rand(batch, width - 1, device=place.device) < rate) & (place < drafts.unsqueeze(1))
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

    def of_part(self, part: slice) -> _Verified:
        """Those of a run of requests."""
        return self.take(np.arange(len(self.counts))[part])

    def take(self, requests: np.ndarray) -> _Verified:
        """Those of some requests."""
        firsts = (np.cumsum(self.counts) - self.counts)[requests]
        return self._at(self.rows[firsts], self.counts[requests])
