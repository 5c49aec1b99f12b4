"""Ledger: the scheduler's side of mask slots, which it sees as its own padding id -1."""

from __future__ import annotations

import copy

from vllm_idlm.patching import of_isd, patch, require, runs_isd
from vllm_idlm.patching import original as before

_SCHEDULER = "vllm.v1.core.sched.scheduler"

masks_are_no_drafts = patch(
    "masks-are-no-drafts",
    _SCHEDULER,
    what="Scheduler.make_spec_decoding_stats counts real drafts only, and no cold forward; slots travel beside them",
    why="vLLM counts every scheduled speculative slot as a draft; mask slots draft, they are not drafts",
    removed_by="num_invalid_spec_tokens filled by vLLM for -1 slots also without asynchronous scheduling (vllm#50518), "
    "and scheduled rows among its statistics",
)


@masks_are_no_drafts.wraps(
    "Scheduler.update_from_output", holds=("num_invalid_spec_tokens=scheduler_output.num_invalid",)
)
def update_from_output(original, self, scheduler_output, model_runner_output):
    """Count each request's -1 slots first; of Model Runner V2 the output itself says how many were drafts."""
    if of_isd(self):
        slots = scheduler_output.scheduled_spec_decode_tokens
        drafts = getattr(model_runner_output, "isd_drafts", None)
        scheduler_output.num_invalid_spec_tokens = {
            r: given.count(-1) if drafts is None else len(given) - drafts.get(r, 0) for r, given in slots.items()
        }
    return original(self, scheduler_output, model_runner_output)


@masks_are_no_drafts.wraps("Scheduler.make_spec_decoding_stats")
def make_spec_decoding_stats(
    original, self, spec_decoding_stats, num_draft_tokens, num_accepted_tokens, num_invalid_spec_tokens, request_id
):
    """Leave forwards without drafts out, and put the slots where `vllm_idlm.metrics` reads them."""
    given = spec_decoding_stats, num_draft_tokens, num_accepted_tokens, num_invalid_spec_tokens, request_id
    if not of_isd(self):
        return original(self, *given)
    self.isd_slots = getattr(self, "isd_slots", 0) + num_draft_tokens
    if num_draft_tokens == (num_invalid_spec_tokens or {}).get(request_id, 0):
        return spec_decoding_stats
    stats = original(self, *given)
    if stats is not None:  # the last place of a row is never a draft's
        stats.num_draft_tokens_per_pos[-1] += self.isd_slots
        self.isd_slots = 0
    return stats


draft_lora_slot = patch(
    "draft-lora-slot",
    _SCHEDULER,
    "lora",
    what="the scheduler counts the users' LoRA slots, not the draft adapter's",
    why="vLLM's max_loras includes the slot that the draft adapter holds for good; a batch that used it would evict it",
    removed_by="reserved LoRA slots in vLLM's LoRAConfig (vllm#52038)",
)


@draft_lora_slot.wraps("Scheduler.__init__", holds=("self.lora_config = vllm_config.lora_config",))
def init_lora(original, self, *args, **kwargs):
    """Give the scheduler a LoRA configuration without the draft adapter's slot."""
    original(self, *args, **kwargs)
    if of_isd(self) and self.lora_config is not None:
        from vllm_idlm.engine_args import USER_LORAS

        self.lora_config = copy.copy(self.lora_config)
        self.lora_config.max_loras = self.vllm_config.additional_config[USER_LORAS]


v2_pace = patch(
    "v2-pace",
    _SCHEDULER,
    "v2", "auto",
    what="on Model Runner V2 under auto, the scheduler asks ISD how many slots rows get, and tells it what steps did",
    why="vLLM's table of speculative tokens by batch size is fixed at start; here it follows acceptance and time",
    removed_by="a scheduler hook for the number of speculative tokens of a step",
)  # fmt: skip
v2_pace.reads("Scheduler.schedule", "self", holds=("self.dynamic_sd_lookup[",))


@v2_pace.wraps("Scheduler.__init__", holds=("self.dynamic_sd_lookup: list[int] | None = None",))
def init_pace(original, self, *args, **kwargs):
    """Put ISD's pace in the place of vLLM's table."""
    original(self, *args, **kwargs)
    if of_isd(self):
        from vllm_idlm.v2 import pace

        if pace.paced(self.vllm_config):
            self.isd_pace = self.dynamic_sd_lookup = pace.Pace(self)


@v2_pace.wraps("Scheduler.update_from_output")
def observe(original, self, scheduler_output, model_runner_output):
    """Tell the pace what the step did."""
    if (pace := getattr(self, "isd_pace", None)) is not None:
        pace.observe(scheduler_output, model_runner_output)
    return original(self, scheduler_output, model_runner_output)


engine_core = patch(
    "engine-core",
    "vllm.v1.engine.core",
    what="EngineCore._initialize_kv_caches requires the patches of all that its engine runs, in its own process",
    why="the scheduler's patches are applied in that process, which builds nothing of ISD's before",
    removed_by="a hook of a plugin at the start of an engine core",
)


@engine_core.wraps("EngineCore._initialize_kv_caches")
def require_here(original, self, vllm_config):
    """Refuse an engine with ISD before its scheduler is made."""
    if runs_isd(vllm_config):
        from vllm_idlm.engine_args import features

        require(features(vllm_config))
    return original(self, vllm_config)


v2_pace_start = patch(
    "v2-pace-start",
    "vllm.v1.engine.core",
    "v2", "auto",
    what="once an engine's workers are warm, what rows cost there is put where its scheduler finds it (auto on V2)",
    why="workers measure it, the scheduler decides by it, and vLLM makes the scheduler without a way to ask workers",
    removed_by="a hook of the scheduler after the workers' warm-up",
)  # fmt: skip
v2_pace_start.reads("EngineCore.__init__", holds=("self._initialize_kv_caches(vllm_config)", "Scheduler("))


@v2_pace_start.wraps("EngineCore._initialize_kv_caches", holds=("self.model_executor.initialize_from_config(",))
def _initialize_kv_caches(original, self, vllm_config):
    """Fetch the measurements behind it: plugins are loaded within `__init__`, which is running by then."""
    result = original(self, vllm_config)
    if not runs_isd(vllm_config):
        return result
    from vllm_idlm.v2 import pace

    if pace.paced(vllm_config):
        vllm_config.additional_config[pace.MEASURED] = self.model_executor.collective_rpc(pace.measured)[0]
    return result


masks_behind_prompts = patch(
    "masks-behind-prompts",
    _SCHEDULER,
    what="the forward that ends a prompt carries mask slots too, so that an answer's first decode forward has drafts: "
    "a settled SchedulerOutput is widened by them (four of its fields, and blocks from the cache manager)",
    why="vLLM gives speculative slots to requests that decode; ISD's drafts come from slots of the forward before",
    removed_by="speculative slots for requests whose prompt ends in the step, or a hook on a settled SchedulerOutput",
    optional=True,
)
masks_behind_prompts.reads(
    "Scheduler.schedule", "self",
    holds=("self._update_after_schedule(scheduler_output)", "self._inflight_prefills.add(request)"),
)  # fmt: skip
masks_behind_prompts.reads(
    f"{_SCHEDULER}:Scheduler",
    fields=("_inflight_prefills", "kv_cache_manager", "needs_kv_cache_zeroing", "connector", "requests",
            "max_model_len", "max_num_scheduled_tokens", "use_v2_model_runner"),
)  # fmt: skip
masks_behind_prompts.reads(
    "vllm.v1.core.sched.output:SchedulerOutput",
    fields=("scheduled_new_reqs", "scheduled_cached_reqs", "num_scheduled_tokens", "total_num_scheduled_tokens",
            "scheduled_spec_decode_tokens"),
)  # fmt: skip
masks_behind_prompts.reads("vllm.v1.core.sched.output:NewRequestData", fields=("req_id", "block_ids"))
masks_behind_prompts.reads(
    "vllm.v1.core.sched.output:CachedRequestData", fields=("req_ids", "resumed_req_ids", "new_block_ids")
)
masks_behind_prompts.reads(
    "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots", "self", "request", "num_new_tokens"
)


@masks_behind_prompts.wraps(
    "Scheduler._update_after_schedule", holds=("request.num_computed_tokens += num_scheduled_token",)
)
def widen(original, self, scheduler_output):
    """Widen the step's prompts by their masks; it is the last thing that `schedule` does with its output."""
    if of_isd(self):
        if not hasattr(self, "isd_prompts"):
            from vllm_idlm.prompt_masks import PromptMasks

            self.isd_prompts = PromptMasks(self)
        self.isd_prompts.widen(scheduler_output)
    return original(self, scheduler_output)


requests_may_opt_out = patch(
    "requests-may-opt-out",
    "vllm.v1.core.sched.async_scheduler",
    "v2",
    what="AsyncScheduler gives no speculative slots to requests that opt out of ISD",
    why="it gives every request its placeholders at once; without asynchronous scheduling slots go through "
    "validate_tokens, where ISD drops them (requests-keep-slots)",
    removed_by="a per-request off switch for speculation in vLLM (vllm#55412, closed)",
)


@requests_may_opt_out.wraps(
    "AsyncScheduler._update_after_schedule", holds=("request.spec_token_ids = self._spec_token_placeholders",)
)
def drop_placeholders(original, self, scheduler_output):
    """Take the placeholders of requests that opt out away again."""
    result = original(self, scheduler_output)
    if of_isd(self):
        from vllm_idlm.settings import wants_isd

        for request in map(self.requests.get, scheduler_output.num_scheduled_tokens):
            if request is not None and not wants_isd(request.sampling_params):
                request.spec_token_ids = []
    return result


requests_keep_slots = patch(
    "requests-keep-slots",
    "vllm.v1.structured_output",
    what="StructuredOutputManager.validate_tokens leaves ISD's slots alone, and takes those of requests that opt out",
    why="it strips the masks, which ends in plain decoding; and dropping a draft because it breaks the grammar biases "
    "sampled output: such a draft must be rejected (its p is 0 under the grammar mask) and resampled from the residual",
    removed_by="validation that pads with -1 and leaves rejection to the sampler, as asynchronous scheduling half does "
    "(vllm#37922 and #47885 go another way)",
)


@requests_keep_slots.wraps("StructuredOutputManager.validate_tokens")
def validate_tokens(original, self, request, spec_tokens):
    """Keep every slot of a request that wants ISD."""
    if not of_isd(self):
        return original(self, request, spec_tokens)
    from vllm_idlm.settings import wants_isd

    return spec_tokens if wants_isd(request.sampling_params) else []


grammar_sees_drafts = patch(
    "grammar-sees-drafts",
    "vllm.v1.structured_output",
    "grammar",
    what="StructuredOutputManager.grammar_bitmask sees -1 from the first draft on that breaks the grammar",
    why="vLLM advances the grammar over every draft, and takes one that breaks it for an error; here such drafts are "
    "verified too (requests-keep-slots)",
    removed_by="as requests-keep-slots",
)


@grammar_sees_drafts.wraps(
    "StructuredOutputManager.grammar_bitmask", holds=("apply_bitmask = not seen_padding", "if token == -1:")
)
def grammar_bitmask(original, self, requests, structured_output_request_ids, scheduled_spec_decode_tokens):
    """Put -1 in the place of such drafts.

    The row of the first gets its mask like any other (so its p is 0); the rows behind it are never emitted from.
    """
    if of_isd(self):
        check = before("vllm.v1.structured_output:StructuredOutputManager.validate_tokens")
        slots = dict(scheduled_spec_decode_tokens)
        for request in structured_output_request_ids:
            if given := slots.get(request):
                valid = check(self, requests[request], given)
                slots[request] = [*valid, *[-1] * (len(given) - len(valid))]
        scheduled_spec_decode_tokens = slots
    return original(self, requests, structured_output_request_ids, scheduled_spec_decode_tokens)
