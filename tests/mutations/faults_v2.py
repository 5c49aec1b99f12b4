"""Faults in Model Runner V2 outside of its kernels: the speculator, its LoRA mapping, extra groups, auto's pace."""

from tests.mutations.fault import Fault

_SPECULATOR, _SAMPLER, _LORA = "vllm_idlm/v2/speculator.py", "vllm_idlm/v2/sampler.py", "vllm_idlm/v2/lora.py"
_PACE, _TAIL = "vllm_idlm/v2/pace.py", "vllm_idlm/tail.py"
_ENGINE = "tests/interpreted/test_speculator.py"
_FORWARDS = f"{_ENGINE}::test_each_forward_equals_the_reference"
_LAST = (f"{_FORWARDS}[4-last-gated]", _ENGINE)
_ALL = (f"{_FORWARDS}[4-all-gated]", f"{_FORWARDS}[4-[2, 0]-gated]", _ENGINE)
_SEEDS = (f"{_ENGINE}::test_a_seeded_request_has_one_text", "tests/interpreted/test_sampler.py", _ENGINE)
_PACED = ("tests/interpreted/test_pace.py",)

FAULTS = [
    Fault(
        "v2-drafts-one-forward-stale", "v2", _SPECULATOR,
        old="            self.num_drafts[input_batch.idx_mapping] = count\n",
        new="            self.num_drafts[input_batch.idx_mapping] = step.drafts\n",
        says="A forward verifies as many drafts as the one before it had: mask tokens among them.",
        tests=_LAST,
    ),
    Fault(
        "v2-drafts-survive-a-plain-step", "v2", _SPECULATOR,
        old="            self.num_drafts[input_batch.idx_mapping] = count\n",
        new="            if step.logits is not None:\n"
        "                self.num_drafts[input_batch.idx_mapping] = count\n",
        says="Behind a step without slots mask tokens are verified as drafts, and accepted where text is sampled.",
        tests=("tests/interpreted/test_sampler.py", f"{_ENGINE}::test_schedule_and_opt_out", *_PACED, _ENGINE),
    ),
    Fault(
        "v2-mask-rows-one-early", "v2", _SPECULATOR,
        old="        place, count = step.drafts + 1, torch.where(whole, step.masks, 0)",
        new="        place, count = step.drafts, torch.where(whole, step.masks, 0)",
        says="Drafts are one place early: the first repeats the certain token, and hardly any is right.",
        tests=_LAST,
    ),
    Fault(
        "v2-masks-behind-a-rejection-propose", "v2", _SPECULATOR,
        old="        place, count = step.drafts + 1, torch.where(whole, step.masks, 0)",
        new="        place, count = step.drafts + 1, step.masks",
        says="After a rejection drafts are taken from masks that saw the rejected draft: no cold forward, no gain.",
        tests=_LAST,
    ),
    Fault(
        "v2-group-of-one-draft-more", "v2", _SPECULATOR,
        old="self.tail.plan.order[accepted.clamp(0, most - 1).long()]",
        new="self.tail.plan.order[(accepted + 1).clamp(0, most - 1).long()]",
        says="After a rejection drafts come from masks that saw the rejected draft: hardly any is right.",
        tests=_ALL,
    ),
    Fault(
        "v2-groups-in-the-wrong-order", "v2", _TAIL,
        old="        self.order[list(groups)] = torch.arange(len(groups), device=device)",
        new="        self.order[list(groups)] = torch.arange(len(groups), device=device).flip(0)",
        says="After a rejection drafts come from another group's masks: hardly any is right.",
        tests=_ALL,
    ),
    Fault(
        "v2-group-place-one-late", "v2", _SPECULATOR,
        old="            behind = 1 + (2 + order) * most",
        new="            behind = 2 + (2 + order) * most",
        says="After a rejection drafts come from the second mask of their group on.",
        tests=_ALL,
    ),
    Fault(
        "v2-new-slots-are-zeros", "v2", _SPECULATOR,
        old="[self.req_states.req_id_to_index[req_id]].fill_(self.mask_token_id)",
        new="[self.req_states.req_id_to_index[req_id]].fill_(0)",
        says="An answer's first masks hold token 0, and their drafts are rarely right.",
        tests=_LAST,
    ),
    Fault(
        "v2-minus-one-stays-in-slots", "v2", _SPECULATOR,
        old="        slots.masked_fill_(slots < 0, self.mask_token_id)",
        new="        slots.masked_fill_(slots < -1, self.mask_token_id)",
        says="Behind a step of narrower rows the model is given a token with id -1.",
        tests=(f"{_PACED[0]}::test_chunked_prompts_between_rows_of_any_width", *_PACED),
    ),
    Fault(
        "v2-drafts-by-the-place-in-the-batch", "v2", _SPECULATOR,
        old="            position,\n            step.batch.idx_mapping,\n",
        new="            position,\n            torch.arange(len(count), device=self.device),\n",
        says="Drafts are drawn and kept under another request's slot: its seed, its temperature, its q.",
        tests=_SEEDS,
    ),
    Fault(
        "v2-noise-by-slot-not-by-seed", "v2", _SAMPLER,
        old="            states.seeds.gpu,\n",
        new="            torch.arange(len(states.seeds.gpu), device=logits.device),\n",
        says="Seeds do nothing, and requests in the same slot share their noise.",
        tests=_SEEDS,
    ),
    Fault(
        "v2-seeded-requests-by-vllms-sampler", "v2", _SAMPLER,
        old="        return (self._verifier if ours else self._sampler)(logits, input_batch)",
        new="        return self._sampler(logits, input_batch)",
        says="The text of a request with a seed depends on whether others have slots.",
        tests=_SEEDS,
    ),
    Fault(
        "v2-a-masks-key-stays", "v2", _SAMPLER,
        old="            num_rejected=num_rejected,\n",
        new="            num_rejected=(num_rejected - 1).clamp(min=0),\n",
        says="One key of a rejected draft or a mask stays in the sequence, and all that follows is shifted.",
        tests=(*_LAST, "tests/interpreted/test_scheduler_prefix_cache.py"),
    ),
    Fault(
        "v2-a-users-adapter-is-left-out", "v2", _SPECULATOR,
        old="            gate(step.layout, mapping.slots(ids, self.device), mapping.slot_of(DRAFT_LORA_ID), out)",
        new="            own = torch.full_like(mapping.slots(ids, self.device), -1)\n"
        "            gate(step.layout, own, mapping.slot_of(DRAFT_LORA_ID), out)",
        says="A request that asks for its own adapter is answered by the base model.",
        tests=(f"{_ENGINE}::test_user_adapters", _ENGINE),
    ),
    Fault(
        "v2-lora-groups-one-row-late", "v2", _LORA,
        old="    counts.scatter_add_(0, (mapping + 1).long(),",
        new="    counts.scatter_add_(0, mapping.clamp(min=0).long(),",
        says="vLLM's LoRA kernels on GPUs add adapters to the wrong rows.",
        tests=("tests/interpreted/test_draft.py::test_lora_metadata_means_what_vllms_means",),
    ),
    Fault(
        "v2-prompts-are-counted-as-forwards", "v2", "vllm_idlm/v2/output.py",
        old="            counted = np.flatnonzero(self._decodes & (emitted > 0))",
        new="            counted = np.flatnonzero(emitted > 0)",
        says="A prompt's forward counts as a cold one, and tokens per forward look worse than they are.",
        tests=_LAST,
    ),
    Fault(
        "v2-auto-ignores-seeds", "v2", _PACE,
        old=" or any(_has_noise_of_its_own(r.sampling_params) for r in self._scheduler.running):",
        new=":",
        says="Under auto the text of a request with a seed depends on clocks.",
        tests=(f"{_PACED[0]}::test_a_seeded_request_has_one_text", *_PACED),
    ),
    Fault(
        "v2-auto-counts-one-draft-more", "v2", _PACE,
        old="            self.acceptance.count(np.where(emitted > 0, real, 0), emitted - 1)",
        new="            self.acceptance.count(np.where(emitted > 0, real, 0), emitted)",
        says="auto takes drafts for better than they are, and chooses rows that do not pay.",
        tests=(f"{_PACED[0]}::test_acceptance_comes_home", *_PACED),
    ),
    Fault(
        "v2-extra-groups-see-themselves-not", "v2", _TAIL,
        old="        fields = torch.stack([at, base + visible, base + own_first, base + row + 1])",
        new="        fields = torch.stack([at, base + visible, base + own_first, base + row])",
        says="A mask of an extra group does not see itself, and drafts badly.",
        tests=("tests/unit/test_tail.py::test_whole_rows_are_what_the_host_lays_out", *_ALL),
    ),
    Fault(
        "v2-extra-groups-keep-vllms-places", "v2", _TAIL,
        old="        positions.copy_(spare[:-1])\n",
        new="",
        says="Masks of extra groups stand at the places behind the row, and draft badly.",
        tests=("tests/unit/test_tail.py::test_whole_rows_are_what_the_host_lays_out", *_ALL),
    ),
]  # fmt: skip
