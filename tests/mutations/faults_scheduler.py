"""Faults in what the scheduler is told: masks behind prompts, opting out, grammars and schedules."""

from tests.mutations.fault import Fault

_PROMPTS, _LEDGER, _SETTINGS = "vllm_idlm/prompt_masks.py", "vllm_idlm/ledger/scheduler.py", "vllm_idlm/settings.py"
_ENGINE, _V2 = "tests/engine", "tests/interpreted/test_speculator.py"
_MASKS = f"{_ENGINE}/test_prompt_masks.py"
_RANDOM = f"{_ENGINE}/test_options_at_random.py"
_WHO = (f"{_MASKS}::test_who_gets_drafts_for_the_first_decode_forward", _MASKS)
_SERVED = (f"{_ENGINE}/test_serve.py",)
_SCHEDULE = f"{_ENGINE}/test_scheduler.py::test_schedule_and_opt_out"
_GRAMMAR = (f"{_ENGINE}/test_options.py::test_option_equals_plain[json-risd-all]", f"{_ENGINE}/test_options.py")

FAULTS = [
    Fault(
        "prompt-masks-exceed-the-budget", "scheduler", _PROMPTS,
        old="        more = min(more, self._scheduler.max_num_scheduled_tokens - output.total_num_scheduled_tokens)\n",
        new="",
        says="Steps have more tokens than max_num_batched_tokens.",
        tests=(f"{_MASKS}::test_a_full_budget_leaves_fewer_masks", _MASKS, f"{_ENGINE}/test_scheduler.py"),
    ),
    Fault(
        "prompt-masks-exceed-the-models-length", "scheduler", _PROMPTS,
        old="        left = self._scheduler.max_model_len - request.num_tokens",
        new="        left = self._scheduler.max_model_len",
        says="A prompt that is nearly as long as the model's length has masks beyond it.",
        tests=(_MASKS, f"{_ENGINE}/test_scheduler.py::test_up_to_the_models_length", _RANDOM),
    ),
    Fault(
        "prompt-masks-counted-as-computed", "scheduler", _PROMPTS,
        old="            output.scheduled_spec_decode_tokens[name] = [MASK] * slots",
        new="            output.scheduled_spec_decode_tokens[name] = [MASK] * (slots - 1)",
        says="The key of a mask counts as a token's: it stays, is cached, and shifts what follows.",
        tests=(*_WHO, f"{_ENGINE}/test_scheduler_prefix_cache.py"),
    ),
    Fault(
        "prompt-masks-blocks-are-not-handed-over", "scheduler", _PROMPTS,
        old="            data.block_ids = _joined(data.block_ids, blocks)\n            return",
        new="            return",
        says="Where masks need a block of their own, all later keys are in the wrong blocks.",
        tests=(
            f"{_MASKS}::test_masks_in_a_block_of_their_own",
            _MASKS,
            f"{_ENGINE}/test_scheduler_prefix_cache.py",
        ),
    ),
    Fault(
        "chunked-prompts-blocks-are-not-handed-over", "scheduler", _PROMPTS,
        old="    cached.new_block_ids[place] = _joined(cached.new_block_ids[place], blocks)",
        new="    cached.new_block_ids[place] = cached.new_block_ids[place]",
        says="Where a chunked prompt's masks need a block of their own, all later keys are in the wrong blocks.",
        tests=(_MASKS, _RANDOM, f"{_ENGINE}/test_scheduler.py::test_chunked_prompts_and_rows"),
    ),
    Fault(
        "prompt-masks-for-seeded-requests", "scheduler", _PROMPTS,
        old="        if params is None or params.seed is not None or params.prompt_logprobs is not None:",
        new="        if params is None or params.prompt_logprobs is not None:",
        says="The text of a request with a seed depends on whether there was room for masks.",
        tests=_WHO,
    ),
    Fault(
        "prompt-masks-beside-prompt-logprobs", "scheduler", _PROMPTS,
        old="        if params is None or params.seed is not None or params.prompt_logprobs is not None:",
        new="        if params is None or params.seed is not None:",
        says="Requests with prompt_logprobs have masks among the rows that these are taken from.",
        tests=_WHO,
    ),
    Fault(
        "prompt-masks-in-spite-of-opting-out", "scheduler", _PROMPTS,
        old="        if request.resumable or not isd_settings.wants_isd(params):",
        new="        if request.resumable:",
        says="A request that opts out of ISD drafts behind its prompt.",
        tests=_WHO,
    ),
    Fault(
        "opting-out-is-ignored", "scheduler", _LEDGER,
        old="    return spec_tokens if wants_isd(request.sampling_params) else []",
        new="    return spec_tokens",
        says="A request that opts out of ISD is decoded by it all the same (Model Runner V1).",
        tests=(f"{_SCHEDULE}", *_SERVED),
    ),
    Fault(
        "v2-opting-out-is-ignored", "scheduler", _LEDGER,
        old="                request.spec_token_ids = []\n",
        new="                pass\n",
        says="A request that opts out of ISD is decoded by it all the same (Model Runner V2).",
        tests=(f"{_V2}::test_schedule_and_opt_out", _V2),
    ),
    Fault(
        "grammars-strip-the-masks", "scheduler", _LEDGER,
        old="""\
    if not of_isd(self):
        return original(self, request, spec_tokens)
    from vllm_idlm.settings import wants_isd
""",
        new="""\
    if not of_isd(self) or request.structured_output_request:
        return original(self, request, spec_tokens)
    from vllm_idlm.settings import wants_isd
""",
        says="Under a grammar ISD ends in plain decoding, and sampled output is biased on the way.",
        tests=(f"{_ENGINE}/test_options.py::test_json_keeps_drafting", *_GRAMMAR),
    ),
    Fault(
        "grammars-see-drafts-that-break-them", "scheduler", _LEDGER,
        old="                slots[request] = [*valid, *[-1] * (len(given) - len(valid))]",
        new="                slots[request] = given",
        says="A draft that breaks a grammar fails its request.",
        tests=_GRAMMAR,
    ),
    Fault(
        "grammars-mask-one-draft-too-few", "scheduler", _LEDGER,
        old="                slots[request] = [*valid, *[-1] * (len(given) - len(valid))]",
        new="                slots[request] = [*valid[:-1], *[-1] * (len(given) - len(valid[:-1]))]",
        says="The row behind the last draft that keeps a grammar is not masked: the output may break it.",
        tests=_GRAMMAR,
    ),
    Fault(
        "draft-adapters-slot-is-lent", "scheduler", _LEDGER,
        old="        self.lora_config.max_loras = self.vllm_config.additional_config[USER_LORAS]",
        new="        self.lora_config.max_loras = self.vllm_config.additional_config[USER_LORAS] + 1",
        says="A batch with as many adapters as there are slots fails, the draft adapter being in one.",
        tests=(f"{_ENGINE}/test_punica.py::test_more_users_adapters_than_slots", f"{_ENGINE}/test_punica.py"),
    ),
    Fault(
        "schedule-ends-one-request-early", "scheduler", _SETTINGS,
        old="            if first <= requests and (last is None or requests <= last):",
        new="            if first <= requests and (last is None or requests < last):",
        says="At the last batch size of a schedule's entry the stride is n.",
        tests=("tests/unit/test_settings.py::test_stride_by_schedule", "tests/unit/test_settings.py"),
    ),
]  # fmt: skip
