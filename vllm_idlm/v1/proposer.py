"""ISD as a proposer of Model Runner V1: plans each forward's slots, and proposes from the logits it already computed.

vLLM builds the class by its `custom_class` method; the ledger (`ledger.runner_v1`) calls the other hooks in this order:
`attach` after the runner was built, `load_model`, `attach_attention`; then each step `begin_step`, `place_extra`,
`lora_mapping`, (the forward), the sampler's `forward`, `propose`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from vllm_idlm import calibrate, patching
from vllm_idlm.engine_args import DRAFT_LORA_ID, by_token_ids
from vllm_idlm.engine_state import EngineState
from vllm_idlm.kernels.draft import confidence
from vllm_idlm.kernels.draft import propose as draw
from vllm_idlm.proposers.estimates import Cost
from vllm_idlm.proposers.state import MASK, Records, Row, plan_groups, plan_slots
from vllm_idlm.tail import plan
from vllm_idlm.v1 import base_graph, noise, policy
from vllm_idlm.v1.base_graph import BaseGraph
from vllm_idlm.v1.sampler import ISDSampler


class Drawn(NamedTuple):
    """What a request's masks proposed."""

    drafts: list[int]
    logits: torch.Tensor | None  # [drafts, vocab], of sampled requests
    confidence: Sequence[float]  # q of each draft, if the policy asks for it


NOTHING = Drawn([], None, ())


class ISDProposer(EngineState):
    """One engine's ISD state: the settings, the record of each request, the rows of the step at hand."""

    def __init__(self, vllm_config: Any) -> None:
        super().__init__(vllm_config)
        self.records = Records()
        self.rows: dict[str, Row] = {}  # of this step's forward, by request
        self.bare = False  # no row of this step has a slot: plain decoding, to be left alone
        self.mapped = True  # the mapping that vLLM's LoRA kernels hold has an adapter in it
        self.policy = policy.Fixed(self.settings)
        self.base_graph: BaseGraph | None = None

    def attach(self, runner: Any) -> None:
        """Take the runner's place for verification: `runner.rejection_sampler` becomes ours."""
        self.runner = runner
        patching.replace("object-v1-rejection-sampler", runner, "rejection_sampler", ISDSampler(runner.sampler, self))

    def attach_attention(self) -> None:
        """Hook the attention of extra groups, once vLLM has made its metadata builders (see `hook_attention`)."""
        if self.settings.groups:
            self.hook_attention()
            if self.tail is None:
                self._only_last()

    def _only_last(self) -> None:
        self.settings = self.settings.model_copy(update={"coverage": "last"})
        self.policy = policy.Fixed(self.settings)

    def warm_up(self) -> None:
        """Once the model is compiled: compile it without LoRA too, and measure what rows cost here, for `auto`."""
        self.hold_draft_lora()
        if self.draft_lora is not None and base_graph.wanted(self.settings):
            self.base_graph = BaseGraph(self.runner)
        if self.settings.coverage != "auto":
            return
        config = self.runner.vllm_config
        if config.parallel_config.world_size_across_dp > 1 or not by_token_ids(
            config
        ):  # ranks have clocks of their own
            self._only_last()
        else:
            self.policy = policy.Auto(self.settings, Cost(*calibrate.measure(self)))

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
        slots, scheduled = output.scheduled_spec_decode_tokens, output.num_scheduled_tokens
        self.bare = not slots and self.stats.trace is None
        if self.bare:
            self.records.drop(scheduled)
        self.rows = (
            {} if self.bare else {request: self.records.take(request, slots.get(request, ())) for request in scheduled}
        )
        width = len(scheduled) + sum(row.width for row in self.rows.values())
        self.policy.begin(scheduled, width, output.total_num_scheduled_tokens)
        mask = self.mask_token_id
        return {request: [mask if s == MASK else s for s in given] for request, given in slots.items()}

    def batch_rows(self) -> list[Row]:
        """The rows of this step, in the order of the runner's batch."""
        return [self.rows.get(request, Row()) for request in self.runner.input_batch.req_ids]

    def place_extra(self, scheduled: np.ndarray) -> None:
        """Give the rows of extra groups their places in the sequence; vLLM has numbered them on behind the row.

        scheduled: [num_reqs] token rows of each request. Their slots in the cache keep vLLM's numbers.
        """
        if self.tail is None or self.bare:
            return
        with self.stats.timed():
            starts = np.cumsum(scheduled) - scheduled
            computed = self.runner.input_batch.num_computed_tokens_cpu[: len(scheduled)]
            self.tail.plan = found = plan(self.batch_rows(), starts, computed)
            if found is not None:
                device = self.runner.positions.device
                rows = torch.from_numpy(found.fields[0].astype(np.int64)).to(device)
                self.runner.positions[rows] = torch.from_numpy(found.positions).to(device)

    def without_lora(self, batch: Any) -> bool:
        """Whether no row of this step has an adapter and the graph without LoRA is chosen: there is nothing to map.

        Not right behind a mapping with adapters in it, which the output head, outside the graphs, would go by.
        """
        alone = self.bare and self.base_graph is not None and not batch.lora_id_to_lora_request
        return alone and not self.mapped and self.base_graph.use(True)

    def lora_mapping(self, batch: Any, scheduled: np.ndarray, sampled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Adapter ids of all logits rows and of all token rows: the request's own, the draft adapter's at mask slots.

        scheduled, sampled: [num_reqs] token rows and logits rows of each request; drafts and masks stand at the end of
        both, behind the pending token or the end of a prompt.
        """
        with self.stats.timed():
            own = batch.request_lora_mapping[: batch.num_reqs]
            if self.bare:
                return np.repeat(own, sampled), np.repeat(own, scheduled)
            rows = self.batch_rows()
            first = np.array([1 + len(row.drafts) for row in rows], dtype=np.int64)
            masks = np.array([row.all_masks for row in rows], dtype=np.int64)
            return tuple(
                _mark(np.repeat(own, count), count, first + count - sampled, masks, DRAFT_LORA_ID)
                for count in (sampled, scheduled)
            )

    # -- after the sampler

    def propose(self, sampled_token_ids: list[list[int]], *_: Any, **__: Any) -> list[list[int]]:
        """The next slots of each request: drafts drawn at this forward's mask rows, then fresh masks (as `MASK`)."""
        self.stats.steps += 1
        if self.tail is not None:
            self.tail.plan = None
        with self.stats.timed():
            return self._begin_again(sampled_token_ids) if self.bare else self._propose(sampled_token_ids)

    def _begin_again(self, sampled_token_ids: list[list[int]]) -> list[list[int]]:
        """The next slots behind a step without any: nothing to draw from, nothing to observe but that it was."""
        requests, states = self.runner.input_batch.req_ids, self.runner.requests
        answered = list(zip(requests, sampled_token_ids, strict=True))
        self.stats.count_bare(sum(bool(t) and len(states[r].output_token_ids) > len(t) for r, t in answered))
        most = self.policy.stride(len(requests)) - 1
        if most == 0 and not self.runner.input_batch.generators:
            return [[] for _ in requests]
        return [self._next_slots(request, NOTHING, most) if tokens else [] for request, tokens in answered]

    def _propose(self, sampled_token_ids: list[list[int]]) -> list[list[int]]:
        rows = self.batch_rows()
        requests = self.runner.input_batch.req_ids
        groups = [
            (i, *row.group(len(tokens) - 1))
            for i, (row, tokens) in enumerate(zip(rows, sampled_token_ids, strict=True))
            if tokens
        ]
        drawn = self._draw([group for group in groups if group[2]])
        if self.forced is not None:
            drawn = {i: self._scripted(requests[i], own) for i, own in drawn.items()}
        forwards = [
            (request, row, tokens)
            for request, row, tokens in zip(requests, rows, sampled_token_ids, strict=True)
            if tokens and len(self.runner.requests[request].output_token_ids) > len(tokens)
        ]
        self.stats.observe(forwards)
        self.policy.observe(forwards)
        most = self.policy.stride(len(requests)) - 1
        return [
            self._next_slots(request, drawn.get(i, NOTHING), most) if tokens else []  # []: a prompt goes on
            for i, (request, tokens) in enumerate(zip(requests, sampled_token_ids, strict=True))
        ]

    def _scripted(self, request: str, drawn: Drawn) -> Drawn:
        drafts = self.forced.ahead(request, self.runner.requests[request].num_tokens, drawn.drafts)
        return drawn if drafts == drawn.drafts else Drawn(drafts, None, drawn.confidence)

    def _next_slots(self, request: str, drawn: Drawn, masks: int) -> list[int]:
        state = self.runner.requests[request]
        limit = min(state.sampling_params.max_tokens or self.runner.max_model_len, self.runner.max_model_len)
        remaining = limit - len(state.output_token_ids)
        seeded = state.generator is not None  # the same text each time: nothing that clocks decide
        if seeded and self.settings.coverage == "auto":
            masks = self.settings.masks
        k, m = plan_slots(min(len(drawn.drafts), masks), masks, remaining)
        groups = self.policy.groups(drawn.confidence[:k], seeded) if k else ()
        extra = plan_groups(k, masks, remaining, groups)
        proposal = drawn.logits[:k] if drawn.logits is not None else None
        return self.records.hand_over(request, Row(drawn.drafts[:k], m, proposal, extra, drawn.confidence[:k]))

    def _draw(self, groups: list[tuple[int, int, int]]) -> dict[int, Drawn]:
        """Drafts of groups of mask rows, by request.

        groups: (request, the group's place among the request's mask rows, masks), at most one of each request.
        """
        if not groups:
            return {}
        sampler: ISDSampler = self.runner.rejection_sampler
        requests, counts = [i for i, _, _ in groups], [count for _, _, count in groups]
        logits = sampler.mask_logits(groups)  # [M, vocab] float32, ours to change
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
        # Without probabilistic drafts nothing was done to `logits` but the ban on the mask token.
        sure = confidence(logits, proposal.drafts).tolist() if self.policy.confident else []
        drawn, start = {}, 0
        for i, count in zip(requests, counts, strict=True):
            own = slice(start, start + count)
            kept = proposal.logits[own] if proposal.logits is not None else None
            drawn[i] = Drawn(ids[own], kept, sure[own] if self.policy.confident else ())
            start += count
        return drawn


def _mark(ids: np.ndarray, counts: np.ndarray, first: np.ndarray, masks: np.ndarray, value: int) -> np.ndarray:
    """`ids` (rows of requests, `counts[i]` each), with `masks[i]` rows of each from row `first[i]` set to `value`."""
    place = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts + first, counts)  # from the first mask
    ids = ids.copy()
    ids[(place >= 0) & (place < np.repeat(masks, counts))] = value
    return ids
