"""Faults in Model Runner V1: the proposer, the sampler, extra groups in its attention, LoRA by rows."""

from tests.mutations.fault import Fault

_PROPOSER, _SAMPLER, _TAIL = "vllm_idlm/v1/proposer.py", "vllm_idlm/v1/sampler.py", "vllm_idlm/tail.py"
_ENGINE = "tests/engine"
_FORWARDS = f"{_ENGINE}/test_proposer.py::test_each_forward_equals_the_reference"
_LAST = (f"{_FORWARDS}[4-last-gated]", f"{_ENGINE}/test_proposer.py", f"{_ENGINE}/test_scheduler_prefix_cache.py")
_ALL = (f"{_FORWARDS}[4-all-gated]", f"{_ENGINE}/test_proposer.py")
_PLACES = ("tests/unit/test_tail.py", *_ALL)
_SAMPLED = (
    f"{_ENGINE}/test_sampler.py::test_greedy_and_sampled_requests_in_one_batch",
    f"{_ENGINE}/test_sampler.py",
)
_SEEDS = (f"{_ENGINE}/test_options_at_random.py",)
_USERS = (f"{_ENGINE}/test_punica.py",)
_RESAMPLE = '            options["resample"] = noise.uniform([1] * len(rows), generators, device)\n'

FAULTS = [
    Fault(
        "verified-rows-one-late", "v1", _SAMPLER,
        old="    verified = [start + np.arange(len(row.drafts) + 1)",
        new="    verified = [start + 1 + np.arange(len(row.drafts) + 1)",
        says="Every token is drawn from the row behind its own.",
        tests=_LAST,
    ),
    Fault(
        "mask-rows-one-early", "v1", _SAMPLER,
        old="    masks = [start + 1 + len(row.drafts) +",
        new="    masks = [start + len(row.drafts) +",
        says="Drafts are one place early: the first repeats the certain token, and hardly any is right.",
        tests=_LAST,
    ),
    Fault(
        "mask-rows-of-the-first-group", "v1", _SAMPLER,
        old="self._mask_rows[i][at : at + count]",
        new="self._mask_rows[i][:count]",
        says="After a rejection drafts come from masks behind all drafts: hardly any is right.",
        tests=_ALL,
    ),
    Fault(
        "rows-in-the-schedulers-order", "v1", _PROPOSER,
        old="        return [self.rows.get(request, Row()) for request in self.runner.input_batch.req_ids]",
        new="        return [*self.rows.values()] or [Row() for _ in self.runner.input_batch.req_ids]",
        says="Once a request has ended, others are verified with each other's drafts.",
        tests=(*_LAST, f"{_ENGINE}/test_scheduler.py::test_abort_in_mid_stream"),
    ),
    Fault(
        "wrong-number-accepted", "v1", _PROPOSER,
        old="            (i, *row.group(len(tokens) - 1))",
        new="            (i, *row.group(len(tokens)))",
        says="The masks behind one draft more than were accepted propose: hardly any draft is right.",
        tests=_ALL,
    ),
    Fault(
        "masks-are-fed-token-0", "v1", _PROPOSER,
        old="        mask = self.mask_token_id\n",
        new="        mask = 0\n",
        says="Mask slots hold another token than the model was trained to fill in: hardly any draft is right.",
        tests=_LAST,
    ),
    Fault(
        "gate-on-the-last-verified-row", "v1", _PROPOSER,
        old="            first = np.array([1 + len(row.drafts) for row in rows], dtype=np.int64)",
        new="            first = np.array([len(row.drafts) for row in rows], dtype=np.int64)",
        says="The draft adapter works on the last verified row: another model's tokens in the text.",
        tests=(*_LAST, f"{_ENGINE}/test_scheduler.py::test_mask_token_in_the_prompt"),
    ),
    Fault(
        "gate-never-on", "v1", _PROPOSER,
        old="first + count - sampled, masks, DRAFT_LORA_ID)",
        new="first + count - sampled, masks, 0)",
        says="The draft adapter is never used: the same text, hardly a draft accepted.",
        tests=_LAST,
    ),
    Fault(
        "gate-from-the-prompts-begin", "v1", _PROPOSER,
        old="first + count - sampled, masks, DRAFT_LORA_ID)",
        new="first, masks, DRAFT_LORA_ID)",
        says="Where masks stand behind a prompt, the draft adapter works on the prompt's second tokens instead.",
        tests=_LAST,
    ),
    Fault(
        "users-adapter-on-mask-rows", "v1", _PROPOSER,
        old="    ids[(place >= 0) & (place < np.repeat(masks, counts))] = value",
        new="    ids[(place >= 0) & (place < np.repeat(masks, counts)) & (ids == 0)] = value",
        says="Requests with an adapter of their own draft with that one: the same text, slower.",
        tests=("tests/unit/v1/test_proposer.py", *_USERS),
    ),
    Fault(
        "draft-adapter-in-place-of-a-users", "v1", _PROPOSER,
        old="_mark(np.repeat(own, count), count,",
        new="_mark(np.repeat(np.where(own > 0, DRAFT_LORA_ID, own), count), count,",
        says="A request that asks for its own adapter is answered with the draft adapter's weights.",
        tests=_USERS,
    ),
    Fault(
        "output-head-keeps-a-users-adapter", "v1", _PROPOSER,
        old="        return alone and not self.mapped and self.base_graph.use(True)",
        new="        return alone and self.base_graph.use(True)",
        says="A request without an adapter gets the output head's of a user whose request has just ended.",
        tests=("tests/unit/v1/test_proposer.py::test_when_no_adapter_is_mapped", f"{_ENGINE}/test_base_graph.py"),
    ),
    Fault(
        "no-lora-if-the-first-row-has-none", "v1", "vllm_idlm/punica.py",
        old="        self.no_lora = tokens == 0 or token_slots.max() < 0",
        new="        self.no_lora = tokens == 0 or token_slots[0] < 0",
        says="All adapters are left out of a step whose first row has none, users' adapters too.",
        tests=("tests/unit/test_punica.py", *_USERS, *_LAST),
    ),
    Fault(
        "extra-groups-one-place-early", "v1", _TAIL,
        old="        found += [(first + i, j + 1 + i, j + 1, first) for i in range(m)]",
        new="        found += [(first + i, j + i, j + 1, first) for i in range(m)]",
        says="Masks of extra groups stand at the places before theirs, and draft badly.",
        tests=_PLACES,
    ),
    Fault(
        "extra-groups-see-the-rejected-draft", "v1", _TAIL,
        old="        found += [(first + i, j + 1 + i, j + 1, first) for i in range(m)]",
        new="        found += [(first + i, j + 1 + i, j + 2, first) for i in range(m)]",
        says="Masks of an extra group see the draft whose rejection they are there for, and draft badly.",
        tests=_PLACES,
    ),
    Fault(
        "causal-rows-see-extra-groups", "v1", _TAIL,
        old="    lengths = np.where(second, extra[order], seq[order] - extra[order])",
        new="    lengths = np.where(second, extra[order], seq[order])",
        says="Verified rows attend to masks behind them: other tokens than plain decoding's.",
        tests=_ALL,
    ),
    Fault(
        "greedy-requests-are-sampled", "v1", _SAMPLER,
        old='            options["greedy"] = sampling.temperature == 0',
        new='            options["greedy"] = sampling.temperature < 0',
        says="A greedy request beside a sampled one is sampled at temperature 1.",
        tests=_SAMPLED,
    ),
    Fault(
        "accept-and-resample-share-their-noise-v1", "v1", _SAMPLER,
        old=_RESAMPLE,
        new=_RESAMPLE
        + "            for i in np.flatnonzero(counts):\n"
        + '                options["resample"][i] = options["uniform"][sum(counts[:i])]\n',
        says="The number that rejects the first draft also draws the token after it: sampled text is biased.",
        tests=_SAMPLED,
    ),
    Fault(
        "seeds-are-ignored", "v1", "vllm_idlm/v1/noise.py",
        old="        if count and generator is not None:",
        new="        if count and generator is None:",
        says="A request with a seed gives another text each time.",
        tests=_SEEDS,
    ),
    Fault(
        "draft-noise-of-another-request", "v1", _PROPOSER,
        old="            generators = [sampling.generators.get(i) for i in requests]",
        new="            generators = [sampling.generators.get(i) for i in range(len(requests))]",
        says="The text of a request with a seed depends on its company.",
        tests=_SEEDS,
    ),
    Fault(
        "seeded-requests-by-vllms-sampler", "v1", _SAMPLER,
        old="        if not any(metadata.num_draft_tokens) and not sampling.generators:",
        new="        if not any(metadata.num_draft_tokens):",
        says="The text of a request with a seed depends on whether others have slots.",
        tests=_SEEDS,
    ),
    Fault(
        "lossy-the-wrong-way", "v1", _SAMPLER,
        old='            options["uniform"] = options["uniform"] * alpha  #',
        new='            options["uniform"] = options["uniform"] / alpha  #',
        says="lossy_alpha below 1 rejects more drafts: text that is not the model's, and slower.",
        tests=(f"{_ENGINE}/test_sampler.py::test_a_lossy_setting_is_lossy", f"{_ENGINE}/test_sampler.py"),
    ),
    Fault(
        "lossy-always", "v1", _SAMPLER,
        old="if (alpha := self.isd.settings.lossy_alpha) < 1 and",
        new="if (alpha := min(self.isd.settings.lossy_alpha, 0.8)) < 1 and",
        says="Sampled text is not the model's, although nobody asked for a lossy setting.",
        tests=_SAMPLED,
    ),
    Fault(
        "block-verification-is-never-used", "v1", _SAMPLER,
        old='self.isd.settings.verify == "block" else verify',
        new='self.isd.settings.verify == "blocks" else verify',
        says="The setting verify=block does nothing.",
        tests=(f"{_ENGINE}/test_sampler.py", f"{_ENGINE}/test_proposer.py"),
    ),
    Fault(
        "records-outlive-aborted-requests", "v1", _PROPOSER,
        old="        self.records.drop(output.finished_req_ids)\n",
        new="",
        says="Every aborted request leaves its record, and memory grows.",
        tests=(f"{_ENGINE}/test_scheduler.py::test_abort_in_mid_stream", *_SAMPLED[:1]),
    ),
]  # fmt: skip
