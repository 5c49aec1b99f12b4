"""Ledger: the scheduler's side of mask slots, which it sees as its own padding id -1."""

from __future__ import annotations

import functools
from types import ModuleType

from vllm_idlm.ledger.core import expect, expect_source, patch, runs_isd

_SCHEDULER = "vllm.v1.core.sched.scheduler"


@patch(
    "masks-are-no-drafts",
    _SCHEDULER,
    what="Scheduler.make_spec_decoding_stats counts real drafts only, and no cold forward; slots travel beside them",
    why="vLLM counts every scheduled speculative slot as a draft; mask slots draft, they are not drafts",
    removed_by="num_invalid_spec_tokens filled by vLLM for -1 slots also without asynchronous scheduling, and "
    "scheduled rows among its statistics",
)
def masks_are_no_drafts(module: ModuleType) -> None:
    """Wrap `update_from_output` (to count each request's -1 slots) and `make_spec_decoding_stats`."""
    scheduler = module.Scheduler
    update = expect_source(scheduler, "update_from_output", "num_invalid_spec_tokens=scheduler_output.num_invalid")
    stats = expect(scheduler, "make_spec_decoding_stats", "self", "spec_decoding_stats", "num_draft_tokens")

    @functools.wraps(update)
    def update_from_output(self, scheduler_output, model_runner_output):
        if runs_isd(self.vllm_config):
            slots = scheduler_output.scheduled_spec_decode_tokens
            drafts = getattr(model_runner_output, "isd_drafts", None)  # of Model Runner V2, which alone knows there
            scheduler_output.num_invalid_spec_tokens = {
                r: given.count(-1) if drafts is None else len(given) - drafts.get(r, 0) for r, given in slots.items()
            }
        return update(self, scheduler_output, model_runner_output)

    @functools.wraps(stats)
    def make_spec_decoding_stats(
        self, spec_decoding_stats, num_draft_tokens, num_accepted_tokens, num_invalid_spec_tokens, request_id
    ):
        if not runs_isd(self.vllm_config):
            return stats(
                self, spec_decoding_stats, num_draft_tokens, num_accepted_tokens, num_invalid_spec_tokens, request_id
            )
        self.isd_slots = getattr(self, "isd_slots", 0) + num_draft_tokens
        if num_draft_tokens == (num_invalid_spec_tokens or {}).get(request_id, 0):
            return spec_decoding_stats
        found = stats(
            self, spec_decoding_stats, num_draft_tokens, num_accepted_tokens, num_invalid_spec_tokens, request_id
        )
        if found is not None:  # the last place of a row is never a draft's, and `vllm_idlm.metrics` reads it
            found.num_draft_tokens_per_pos[-1] += self.isd_slots
            self.isd_slots = 0
        return found

    scheduler.update_from_output = update_from_output
    scheduler.make_spec_decoding_stats = make_spec_decoding_stats


@patch(
    "draft-lora-slot",
    _SCHEDULER,
    what="the scheduler counts the users' LoRA slots, not the draft adapter's",
    why="vLLM's max_loras includes the slot that the draft adapter holds for good; a batch that used it would evict it",
    removed_by="reserved LoRA slots in vLLM's LoRAConfig",
)
def draft_lora_slot(module: ModuleType) -> None:
    """Wrap `Scheduler.__init__`."""
    import copy

    scheduler = module.Scheduler
    original = expect_source(scheduler, "__init__", "self.lora_config = vllm_config.lora_config")

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):  # noqa: N807
        original(self, *args, **kwargs)
        from vllm_idlm.engine_args import USER_LORAS

        if runs_isd(self.vllm_config) and self.lora_config is not None:
            self.lora_config = copy.copy(self.lora_config)
            self.lora_config.max_loras = self.vllm_config.additional_config[USER_LORAS]

    scheduler.__init__ = __init__


@patch(
    "v2-pace",
    _SCHEDULER,
    what="on Model Runner V2 under auto, the scheduler asks ISD how many slots rows get, and tells it what steps did",
    why="vLLM's table of speculative tokens by batch size is fixed at start; here it follows acceptance and time",
    removed_by="a scheduler hook for the number of speculative tokens of a step",
)
def v2_pace(module: ModuleType) -> None:
    """Wrap `Scheduler.__init__` and `update_from_output`."""
    scheduler = module.Scheduler
    original = expect_source(scheduler, "__init__", "self.dynamic_sd_lookup: list[int] | None = None")
    expect_source(scheduler, "schedule", "self.dynamic_sd_lookup[")
    update = expect(scheduler, "update_from_output", "self", "scheduler_output", "model_runner_output")

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):  # noqa: N807
        original(self, *args, **kwargs)
        from vllm_idlm.v2 import pace

        self.isd_pace = None
        if pace.paced(self.vllm_config):
            self.isd_pace = self.dynamic_sd_lookup = pace.Pace(self)

    @functools.wraps(update)
    def update_from_output(self, scheduler_output, model_runner_output):
        if self.isd_pace is not None:
            self.isd_pace.observe(scheduler_output, model_runner_output)
        return update(self, scheduler_output, model_runner_output)

    scheduler.__init__, scheduler.update_from_output = __init__, update_from_output


@patch(
    "v2-pace-start",
    "vllm.v1.engine.core",
    what="once an engine's workers are warm, what rows cost there is put where its scheduler finds it (auto on V2)",
    why="workers measure it, the scheduler decides by it, and vLLM makes the scheduler without a way to ask workers",
    removed_by="a hook of the scheduler after the workers' warm-up",
)
def v2_pace_start(module: ModuleType) -> None:
    """Wrap `EngineCore._initialize_kv_caches`: plugins are loaded within `__init__`, which is running by then."""
    core = module.EngineCore
    original = expect_source(core, "_initialize_kv_caches", "self.model_executor.initialize_from_config(")
    expect_source(core, "__init__", "self._initialize_kv_caches(vllm_config)", "Scheduler(")

    @functools.wraps(original)
    def _initialize_kv_caches(self, vllm_config):
        result = original(self, vllm_config)
        from vllm_idlm.v2 import pace

        if pace.paced(vllm_config):
            vllm_config.additional_config[pace.MEASURED] = self.model_executor.collective_rpc(pace.measured)[0]
        return result

    core._initialize_kv_caches = _initialize_kv_caches


@patch(
    "masks-behind-prompts",
    _SCHEDULER,
    what="the forward that ends a prompt carries mask slots too, so that an answer's first decode forward has drafts",
    why="vLLM gives speculative slots to requests that decode; ISD's drafts come from slots of the forward before",
    removed_by="speculative slots for requests whose prompt ends in the step, or a hook on a settled SchedulerOutput",
)
def masks_behind_prompts(module: ModuleType) -> None:
    """Wrap `_update_after_schedule`, the last thing that `schedule` does with its output."""
    scheduler = module.Scheduler
    original = expect_source(scheduler, "_update_after_schedule", "request.num_computed_tokens += num_scheduled_token")
    expect_source(
        scheduler, "schedule", "self._update_after_schedule(scheduler_output)", "self._inflight_prefills.add(request)"
    )

    @functools.wraps(original)
    def _update_after_schedule(self, scheduler_output):
        if runs_isd(self.vllm_config):
            if not hasattr(self, "isd_prompts"):
                from vllm_idlm.prompt_masks import PromptMasks

                self.isd_prompts = PromptMasks(self)
            self.isd_prompts.widen(scheduler_output)
        return original(self, scheduler_output)

    scheduler._update_after_schedule = _update_after_schedule


@patch(
    "requests-may-opt-out",
    "vllm.v1.core.sched.async_scheduler",
    what="AsyncScheduler gives no speculative slots to requests that opt out of ISD",
    why="it gives every request its placeholders at once; without asynchronous scheduling slots go through "
    "validate_tokens, where ISD drops them (grammar-keeps-slots)",
    removed_by="a per-request off switch for speculation in vLLM",
)
def requests_may_opt_out(module: ModuleType) -> None:
    """Wrap `_update_after_schedule`."""
    scheduler = module.AsyncScheduler
    original = expect_source(
        scheduler, "_update_after_schedule", "request.spec_token_ids = self._spec_token_placeholders"
    )

    @functools.wraps(original)
    def _update_after_schedule(self, scheduler_output):
        original(self, scheduler_output)
        if runs_isd(self.vllm_config):
            from vllm_idlm.settings import wants_isd

            for request in map(self.requests.get, scheduler_output.num_scheduled_tokens):
                if request is not None and not wants_isd(request.sampling_params):
                    request.spec_token_ids = []

    scheduler._update_after_schedule = _update_after_schedule


@patch(
    "grammar-keeps-slots",
    "vllm.v1.structured_output",
    what="StructuredOutputManager.validate_tokens leaves ISD's slots alone",
    why="it strips the masks, which ends in plain decoding; and dropping a draft because it breaks the grammar biases "
    "sampled output: such a draft must be rejected (its p is 0 under the grammar mask) and resampled from the residual",
    removed_by="validation that pads with -1 and leaves rejection to the sampler, as asynchronous scheduling half does",
)
def grammar_keeps_slots(module: ModuleType) -> None:
    """Wrap `validate_tokens`, and `grammar_bitmask` to see -1 from the first draft on that breaks the grammar.

    The row of such a draft gets its mask like any other (so its p is 0); the rows behind it are never emitted from.
    """
    manager = module.StructuredOutputManager
    validate = expect(manager, "validate_tokens", "self", "request", "spec_tokens")
    bitmask = expect(manager, "grammar_bitmask", "self", "requests", "structured_output_request_ids")
    expect_source(manager, "grammar_bitmask", "apply_bitmask = not seen_padding", "if token == -1:")

    @functools.wraps(validate)
    def validate_tokens(self, request, spec_tokens):
        if not runs_isd(self.vllm_config):
            return validate(self, request, spec_tokens)
        from vllm_idlm.settings import wants_isd

        return spec_tokens if wants_isd(request.sampling_params) else []

    @functools.wraps(bitmask)
    def grammar_bitmask(self, requests, structured_output_request_ids, scheduled_spec_decode_tokens):
        if runs_isd(self.vllm_config):
            slots = dict(scheduled_spec_decode_tokens)
            for request in structured_output_request_ids:
                if given := slots.get(request):
                    valid = validate(self, requests[request], given)
                    slots[request] = [*valid, *[-1] * (len(given) - len(valid))]
            scheduled_spec_decode_tokens = slots
        return bitmask(self, requests, structured_output_request_ids, scheduled_spec_decode_tokens)

    manager.validate_tokens, manager.grammar_bitmask = validate_tokens, grammar_bitmask
