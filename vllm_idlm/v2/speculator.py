"""ISD as a speculator of Model Runner V2: what every row of a forward is, and the proposals from its mask rows.

A decode row is always `[x, d1..dk, M, .., M]` with 2(n - 1) slots behind x, so decode batches are uniform; how many of
the slots hold drafts (k, 0 after a rejection) is known to the device alone. The ledger (`ledger.runner_v2`) calls, each
step: `begin_step` when the inputs are laid out, (the forward), `ISDRejectionSampler` if there are drafts or masks (or
a seeded request), and vLLM itself calls `propose`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from vllm_idlm import calibrate
from vllm_idlm.engine_args import DRAFT_LORA_ID
from vllm_idlm.engine_state import EngineState
from vllm_idlm.kernels.draft import MaskRows, draft_rows
from vllm_idlm.kernels.gate import Batch, Gate, gate
from vllm_idlm.patching import replace
from vllm_idlm.tail import DevicePlan
from vllm_idlm.v2 import graphs, memory, warm
from vllm_idlm.v2.lora import GatedLoraState, Mapping
from vllm_idlm.v2.sampler import ISDRejectionSampler, SeededSampler

log = logging.getLogger("vllm.idlm")  # below vLLM's logger, so that it is printed as vLLM's lines are


@dataclass
class Step:
    """One forward of a batch of B requests, by what only the device knows."""

    batch: Any  # vLLM's InputBatch
    layout: Batch
    drafts: Tensor  # [B] int32, drafts to verify
    masks: Tensor  # [B] int32, mask slots behind them
    position: Tensor  # [B] int64, place in the sequence of the first row that has logits
    logits: Tensor | None = None  # [rows, V], of the forward; None if it had no slots
    slots: Tensor | None = None  # [B] int32, drafts and all masks, with extra groups only


class ISDSpeculator(EngineState, BaseSpeculator):
    """One engine's ISD state on the device. Its attributes are by request slot (R = max_num_seqs)."""

    supports_mm_inputs = False

    def __init__(self, vllm_config: Any, device: torch.device, req_states: Any) -> None:
        super().__init__(vllm_config)
        self.device = device
        self.req_states = req_states
        slots = vllm_config.scheduler_config.max_num_seqs
        self.num_drafts = torch.zeros(slots, dtype=torch.int32, device=device)  # of each request's next forward
        self.proposal = self._reserve(vllm_config, slots)
        self.draft_logits = None  # vLLM's own cache of q has twice the rows and is not used
        self.synthetic: float | None = None  # benchmarks only: drafts pass at this rate, whatever they are
        self.step: Step | None = None
        self.measured: dict[str, Any] | None = None  # what the scheduler's `Pace` starts from
        self.mapping: Mapping | None = None
        self._warm = False

    def _reserve(self, vllm_config: Any, slots: int) -> Tensor | None:
        """[R, n - 1, V] for the logits of q in the model's dtype, reserved before vLLM measures what memory is left."""
        if self.settings.draft_sampling == "greedy":
            return None
        model = vllm_config.model_config
        kept = torch.zeros(slots, self.settings.masks, model.get_vocab_size(), dtype=model.dtype, device=self.device)
        log.info(
            "ISD keeps the proposals of %d requests in %.1f MiB (n=%d, %d logits of %s each)",
            slots, kept.nbytes / 2**20, self.settings.n, kept.shape[-1], str(model.dtype).removeprefix("torch."),
        )  # fmt: skip
        return kept

    def attach(self, runner: Any) -> None:
        """Take our places in a runner whose model is loaded: its rejection sampler's, and its LoRA state's."""
        self.runner = runner
        replace("object-v2-samplers", runner, "rejection_sampler", ISDRejectionSampler(runner, self))
        replace("object-v2-samplers", runner, "sampler", SeededSampler(runner.sampler, runner.rejection_sampler))
        add = self.req_states.add_request

        def add_request(req_id: str, *args: Any, **kwargs: Any) -> None:
            add(req_id, *args, **kwargs)
            self.req_states.draft_tokens[self.req_states.req_id_to_index[req_id]].fill_(self.mask_token_id)

        # vLLM fills a new request's slots with zeros, which are drafts of nothing.
        replace("object-v2-samplers", self.req_states, "add_request", add_request)
        if self.settings.lora is not None:
            self.load_model(runner.model)
            runner.lora_state = GatedLoraState(runner.lora_state, self.draft_lora)
            self.mapping = Mapping(runner.lora_manager._adapter_manager)

    def attach_attention(self) -> None:
        """Hook the attention of extra groups, once vLLM has made its metadata builders (see `hook_attention`)."""
        if groups := self.settings.groups[: self.settings.extra]:
            requests = self.runner.max_num_reqs
            self.hook_attention(DevicePlan(self.settings.masks, groups, requests, self.device))

    def profile(self, hidden: Tensor) -> None:
        """Part of vLLM's profile of memory: take and free what our heaviest step needs (see `v2.memory`).

        hidden: hidden states of rows that logits were just made of, for their size and dtype.
        """
        if self.device.type != "cpu":  # there vLLM measures the whole process, which would keep it
            memory.heaviest_step(self, hidden)

    def warm_kernels(self) -> None:
        """Compile our kernels, once. Best called before vLLM watches for kernels that are compiled in mid-service."""
        if not self._warm:
            self._warm = True
            warm.kernels(self)

    def warm_up(self) -> None:
        """Once the model is compiled: our kernels too; what rows cost here, for `auto`, which the scheduler decides."""
        self.hold_draft_lora()
        self.warm_kernels()
        if self.settings.coverage == "auto":
            groups = self.settings.extra if self.tail is not None else 0
            widths = sorted(graphs.captured(self.runner.vllm_config))  # by the mode that vLLM settled on here
            self.measured = {**calibrate.measure(self)._asdict(), "groups": groups, "widths": widths}

    # -- before the forward

    def fill_slots(self) -> None:
        """Mask tokens where vLLM wrote -1 (behind a row narrower than the next one is): no token has that id."""
        slots = self.req_states.draft_tokens
        slots.masked_fill_(slots < 0, self.mask_token_id)

    def begin_step(self, batch: Any) -> None:
        """Work out what the rows of `batch` (an InputBatch) are; with an adapter, `set_active_loras` does."""
        with self.stats.timed():
            step = self.step = self.lay_out(batch)
            if self.mapping is None:
                none = torch.full((batch.num_reqs,), -1, dtype=torch.int64, device=self.device)
                tokens = torch.empty(batch.num_tokens, dtype=torch.int32, device=self.device)
                gate(step.layout, none, -1, Gate(step.drafts, step.masks, tokens, torch.empty_like(tokens)))
                self._place_extra()

    def lay_out(self, batch: Any) -> Step:
        """A step of `batch`, an InputBatch, whose drafts and masks are yet to be written."""
        requests = batch.num_reqs
        # Not two halves of one tensor: Triton compiles anew for a pointer that is not a multiple of 16 bytes.
        drafts, masks = (torch.empty(requests, dtype=torch.int32, device=self.device) for _ in range(2))
        layout = Batch(
            batch.query_start_loc[: requests + 1],
            batch.cu_num_logits,
            batch.seq_lens[:requests],
            self.req_states.prefill_len.gpu,
            batch.idx_mapping,
            self.num_drafts,
        )
        counts = batch.cu_num_logits[1:] - batch.cu_num_logits[:-1]
        return Step(batch, layout, drafts, masks, (batch.seq_lens[:requests] - counts).long())

    def set_active_loras(self, ids: Any, requests: set[Any]) -> None:
        """Activate the adapters of this step, and map each row to its own. ids: [B] adapter id of each request."""
        with self.stats.timed():
            self.runner.lora_manager._apply_adapters(requests)
            step, mapping = self.step, self.mapping
            out = Gate(step.drafts, step.masks, *mapping.begin())
            gate(step.layout, mapping.slots(ids, self.device), mapping.slot_of(DRAFT_LORA_ID), out)
            mapping.finish(step.batch.num_tokens, int(step.batch.cu_num_logits_np[-1]))
            self._place_extra()

    def _place_extra(self) -> None:
        """What the gate counted as masks, by groups: those of the causal row, and the rows behind it."""
        if self.tail is None:
            return
        step, most = self.step, 2 * self.settings.masks
        slots = step.drafts + step.masks
        step.slots = slots
        step.masks = torch.minimum(step.masks, most - step.drafts)
        rows = torch.where(slots > 0, slots + 1, 0)
        batch = step.batch
        self.tail.plan.begin(batch.query_start_loc[: len(rows) + 1], rows, step.position, batch.positions)

    # -- after the sampler

    @torch.inference_mode()
    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: Tensor,
        aux_hidden_states: Any,
        num_sampled: Tensor,
        num_rejected: Tensor,
        last_sampled: Tensor,
        next_prefill_tokens: Tensor,
        temperature: Tensor,
        seeds: Tensor,
        dp_sync_state: Any = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: Any = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> Tensor:
        """The next slots of each request, [B, slots] int64: drafts drawn at this forward's mask rows, then masks.

        num_sampled: [B], tokens that this forward emitted. Drafts are drawn from the masks behind the accepted ones.
        num_speculative_tokens: slots that the next forward will have (less than all under a schedule).
        """
        slots = torch.full(
            (input_batch.num_reqs, self.settings.slots), self.mask_token_id, dtype=torch.int64, device=self.device
        )
        step, self.step = self.step, None
        if self.tail is not None:
            self.tail.plan.end()
        if dummy_run or step is None:
            return slots
        with self.stats.timed():
            self.stats.steps += 1
            most = self.settings.masks
            if num_speculative_tokens is not None:
                most = min(most, num_speculative_tokens // 2)
            count = torch.zeros_like(step.drafts)
            if step.logits is not None and most > 0:
                count, slots[:, : self.settings.masks] = self.draft(step, num_sampled, most, temperature, seeds)
            self.num_drafts[input_batch.idx_mapping] = count
        return slots

    def draft(
        self, step: Step, num_sampled: Tensor, most: int, temperature: Tensor, seeds: Tensor
    ) -> tuple[Tensor, Tensor]:
        """How many drafts each request has next, [B] and at most `most`, and the drafts, [B, n - 1] int64."""
        accepted = num_sampled - 1
        place, found = self._group(step, accepted)
        count, position = torch.where(accepted < 0, 0, found.clamp(max=most)), step.position + accepted + 1
        drafts = torch.empty(len(count), self.settings.masks, dtype=torch.int64, device=self.device)
        rows = MaskRows(
            step.logits,
            step.batch.cu_num_logits[:-1] + place,
            count,
            position,
            step.batch.idx_mapping,
            temperature,
            seeds,
            self.mask_token_id,
        )
        draft_rows(rows, drafts, self.proposal)
        if self.forced is not None:
            drafts = self.forced.over(step.batch.req_ids, position + 1, drafts)
        return count, drafts

    def _group(self, step: Step, accepted: Tensor) -> tuple[Tensor, Tensor]:
        """Place in the row, and number, of the masks behind `accepted` drafts; [B] each."""
        whole = accepted == step.drafts
        place, count = step.drafts + 1, torch.where(whole, step.masks, 0)
        if self.tail is not None:
            most = self.settings.masks
            order = self.tail.plan.order[accepted.clamp(0, most - 1).long()]  # of the group in the row; -1: not carried
            behind = 1 + (2 + order) * most
            left = (step.slots + 1 - behind).clamp(0, most)
            extra = ~whole & (accepted < step.drafts) & (order >= 0)
            place, count = torch.where(extra, behind.int(), place), torch.where(extra, left.int(), count)
        return place, count

    # -- ISD has no model of its own to capture

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """Nothing: the drafts come out of the target's own graph."""

    def capture(self) -> None:
        """Nothing, likewise."""
