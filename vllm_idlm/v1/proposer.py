"""ISD as a proposer of Model Runner V1: plans each forward's slots, and proposes from the logits it already computed.

vLLM builds the class by its `custom_class` method; the ledger (`ledger.runner`) calls the other hooks in this order:
`attach` after the runner was built, `load_model`; then each step `begin_step`, `lora_mapping`, (the forward), the
sampler's `forward`, `propose`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vllm_idlm.engine_args import DRAFT_LORA_ID
from vllm_idlm.engine_state import EngineState
from vllm_idlm.kernels.draft import propose as draw
from vllm_idlm.proposers.state import MASK, Records, Row, all_accepted, plan_slots
from vllm_idlm.v1 import noise
from vllm_idlm.v1.sampler import ISDSampler


class ISDProposer(EngineState):
    """One engine's ISD state: the settings, the record of each request, the rows of the step at hand."""

    def __init__(self, vllm_config: Any) -> None:
        super().__init__(vllm_config)
        self.records = Records()
        self.rows: dict[str, Row] = {}  # of this step's forward, by request

    def attach(self, runner: Any) -> None:
        """Take the runner's place for verification: `runner.rejection_sampler` becomes ours."""
        self.runner = runner
        runner.rejection_sampler = ISDSampler(runner.sampler, self)

    # -- before the forward

    def begin_step(self, output: Any) -> dict[str, list[int]]:
        """Plan this step's rows from a SchedulerOutput; returns its speculative tokens with mask ids in mask slots.

        Every scheduled request's record is taken: what is not verified in this forward is stale in the next.
        """
        with self.stats.timed():
            return self._plan(output)

    def _plan(self, output: Any) -> dict[str, list[int]]:
        self.records.drop(output.finished_req_ids)
        self.records.drop(output.preempted_req_ids or ())
        slots = output.scheduled_spec_decode_tokens
        self.rows = {
            request: self.records.take(request, slots.get(request, ())) for request in output.num_scheduled_tokens
        }
        mask = self.mask_token_id
        return {request: [mask if s == MASK else s for s in given] for request, given in slots.items()}

    def batch_rows(self) -> list[Row]:
        """The rows of this step, in the order of the runner's batch."""
        return [self.rows.get(request, Row()) for request in self.runner.input_batch.req_ids]

    def lora_mapping(self, batch: Any, scheduled: np.ndarray, sampled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Adapter ids of all logits rows and of all token rows: the request's own, the draft adapter's at mask slots.

        scheduled, sampled: [num_reqs] token rows and logits rows of each request; masks are the last rows of both.
        """
        with self.stats.timed():
            own = batch.request_lora_mapping[: batch.num_reqs]
            masks = np.array([row.masks for row in self.batch_rows()], dtype=np.int64)
            return tuple(
                _mark_last(np.repeat(own, count), count, masks, DRAFT_LORA_ID) for count in (sampled, scheduled)
            )

    # -- after the sampler

    def propose(self, sampled_token_ids: list[list[int]], *_: Any, **__: Any) -> list[list[int]]:
        """The next slots of each request: drafts drawn at this forward's mask rows, then fresh masks (as `MASK`)."""
        self.stats.steps += 1
        with self.stats.timed():
            return self._propose(sampled_token_ids)

    def _propose(self, sampled_token_ids: list[list[int]]) -> list[list[int]]:
        rows = self.batch_rows()
        requests = self.runner.input_batch.req_ids
        fresh = [
            i
            for i, (row, tokens) in enumerate(zip(rows, sampled_token_ids, strict=True))
            if row.masks and tokens and all_accepted(row, len(tokens))
        ]
        drafts, logits = self._draw(fresh, rows)
        self.stats.observe([
            (request, row, tokens)
            for request, row, tokens in zip(requests, rows, sampled_token_ids, strict=True)
            if tokens and len(self.runner.requests[request].output_token_ids) > len(tokens)
        ])  # fmt: skip
        most = self.settings.stride(len(requests)) - 1
        return [
            self._next_slots(request, drafts.get(i, [])[:most], most, logits.get(i)) if tokens else []  # []: a prompt
            for i, (request, tokens) in enumerate(zip(requests, sampled_token_ids, strict=True))
        ]

    def _next_slots(self, request: str, drafts: list[int], masks: int, logits: Any) -> list[int]:
        state = self.runner.requests[request]
        limit = min(state.sampling_params.max_tokens or self.runner.max_model_len, self.runner.max_model_len)
        k, m = plan_slots(len(drafts), masks, limit - len(state.output_token_ids))
        return self.records.hand_over(request, Row(drafts[:k], m, logits[:k] if logits is not None else None))

    def _draw(self, requests: list[int], rows: list[Row]) -> tuple[dict[int, list[int]], dict[int, torch.Tensor]]:
        """Drafts (and the logits they were drawn from, for sampled requests) of the given requests' mask rows."""
        if not requests:
            return {}, {}
        sampler: ISDSampler = self.runner.rejection_sampler
        counts = [rows[i].masks for i in requests]
        logits = sampler.mask_logits(requests)  # [M, vocab] float32, ours to change
        sampling = self.runner.input_batch.sampling_metadata
        owner = torch.tensor(requests, device=logits.device).repeat_interleave(
            torch.tensor(counts, device=logits.device)
        )
        options: dict[str, Any] = {}
        if not sampling.all_greedy and self.settings.draft_sampling == "probabilistic":
            temperature = sampling.temperature[owner]
            options["temperature"] = temperature
            options["greedy"] = temperature == 0
            options["top_k"] = sampling.top_k[owner] if sampling.top_k is not None else None
            options["top_p"] = sampling.top_p[owner] if sampling.top_p is not None else None
            generators = [sampling.generators.get(i) for i in requests]
            options["uniform"] = noise.uniform(counts, generators, logits.device)
        proposal = draw(logits, mask_token_id=self.mask_token_id, **options)
        ids = proposal.drafts.tolist()
        drafts, kept, start = {}, {}, 0
        for i, count in zip(requests, counts, strict=True):
            drafts[i] = ids[start : start + count]
            if proposal.logits is not None:
                kept[i] = proposal.logits[start : start + count]
            start += count
        return drafts, kept


def _mark_last(ids: np.ndarray, counts: np.ndarray, last: np.ndarray, value: int) -> np.ndarray:
    """`ids` (rows of requests, `counts[i]` each) with the last `last[i]` rows of each request set to `value`."""
    ends = np.cumsum(counts)
    place = np.arange(len(ids)) - np.repeat(ends, counts)  # -count .. -1 within the request
    ids = ids.copy()
    ids[place >= -np.repeat(last, counts)] = value
    return ids
