"""Ledger: Model Runner V1. Each patch does nothing in a runner whose proposer is not ISD's."""

from __future__ import annotations

import contextlib

from vllm_idlm.patching import Patch, of_isd, patch, runs_isd

_V1 = "vllm.v1.worker.gpu_model_runner"

attach = patch(
    "v1-attach",
    _V1,
    "v1",
    what="after GPUModelRunner.__init__, ISD's proposer takes the runner and replaces its rejection sampler",
    why="a custom_class proposer is given neither the runner nor the logits, and vLLM has no hook for the sampler",
    removed_by="a proposer interface that may bring its rejection sampler and see the target's logits",
)


@attach.wraps("GPUModelRunner.__init__", holds=("create_custom_proposer", "self.rejection_sampler = RejectionSampler("))
def __init__(original, self, *args, **kwargs):  # noqa: N807
    """Set the runner's attribute `isd` to the proposer, if it is ISD's; else there is no such attribute."""
    original(self, *args, **kwargs)
    if not of_isd(self):
        return
    from vllm_idlm.v1.proposer import ISDProposer

    proposer = getattr(self, "drafter", None)
    if isinstance(proposer, ISDProposer):
        self.isd = proposer
        proposer.attach(self)


begin_step = patch(
    "v1-begin-step",
    _V1,
    "v1",
    what="GPUModelRunner._update_states sees mask token ids where the scheduler says -1, and ISD plans its rows first",
    why="towards the scheduler a mask slot is vLLM's own padding id -1; the model needs the mask token there",
    removed_by="a proposer hook at the start of a step that may fill in speculative token ids",
)


@begin_step.wraps("GPUModelRunner._update_states", holds=("scheduler_output.scheduled_spec_decode_tokens",))
def _update_states(original, self, scheduler_output):
    """Leave the scheduler's own lists as they are: in one process they are shared."""
    isd = getattr(self, "isd", None)
    if isd is None:
        return original(self, scheduler_output)
    slots = scheduler_output.scheduled_spec_decode_tokens
    scheduler_output.scheduled_spec_decode_tokens = isd.begin_step(scheduler_output)
    try:
        return original(self, scheduler_output)
    finally:
        scheduler_output.scheduled_spec_decode_tokens = slots


def hook_attention(entry: Patch, holds: str) -> None:
    """Enter, into a patch of a runner's module, that ISD hooks the attention once the key-value cache is there."""

    @entry.wraps("GPUModelRunner.initialize_kv_cache", holds=(holds,))
    def initialize_kv_cache(original, self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        if isd := getattr(self, "isd", None):
            isd.attach_attention()
        return result


extra_groups = patch(
    "v1-extra-groups",
    _V1,
    "v1", "groups",
    what="ISD hooks the engine's attention layers and metadata builders, and places the rows of extra groups, after "
    "GPUModelRunner.initialize_kv_cache and _prepare_inputs",
    why="vLLM numbers a request's rows on and attends to them causally; groups of mask slots behind each draft do "
    "neither",
    removed_by="positions and an attention mask of a proposer's own for speculative rows (vllm#18327, #42910)",
)  # fmt: skip
hook_attention(extra_groups, "self.initialize_metadata_builders(")


@extra_groups.wraps(
    "GPUModelRunner._prepare_inputs",
    holds=("self.positions[:total_num_scheduled_tokens]", "self.input_batch.block_table.compute_slot_mapping("),
)
def _prepare_inputs(original, self, scheduler_output, num_scheduled_tokens):
    """Place the extra rows once vLLM has numbered all rows and given them their slots of the cache."""
    result = original(self, scheduler_output, num_scheduled_tokens)
    if isd := getattr(self, "isd", None):
        isd.place_extra(num_scheduled_tokens)
    return result


def _measures(entry: Patch, name: str, own: bool = False) -> None:
    """Enter, into a patch of a worker's module, that ISD's warm-up goes around the worker's."""

    @entry.wraps(name, own=own)
    def compile_or_warm_up_model(original, self, *args, **kwargs):
        isd = getattr(getattr(self, "model_runner", None), "isd", None)
        if isd:
            isd.warm_kernels()  # behind vLLM's own, its monitor warns of every compilation
        result = original(self, *args, **kwargs)
        if isd:
            isd.warm_up()
        return result


_MEASURED = {
    "what": "around the worker's compile_or_warm_up_model, ISD compiles its kernels, measures what rows cost and puts "
    "its adapter back",
    "why": "which groups of mask slots pay depends on it, and it is known only once the model is compiled; vLLM drops "
    "every adapter at the end of its warm-up",
    "removed_by": "hooks of a proposer before and after the warm-up",
}
warm_up = patch("warm-up", "vllm.v1.worker.gpu_worker", **_MEASURED)
_measures(warm_up, "Worker.compile_or_warm_up_model")
warm_up_cpu = patch("warm-up-cpu", "vllm.v1.worker.cpu_worker", "cpu", **_MEASURED)
_measures(warm_up_cpu, "CPUWorker.compile_or_warm_up_model", own=True)

row_near_the_end = patch(
    "v1-row-near-the-end",
    _V1,
    "v1",
    what="GPUModelRunner._input_fits_in_drafter is true for ISD",
    why="it turns drafting off for the whole batch when one request nears max_model_len; ISD's slots are cut "
    "per request by the scheduler, and a proposer that is not called could not keep its records",
    removed_by="a per-request check, or a proposer that declares it needs no check",
)


@row_near_the_end.wraps("GPUModelRunner._input_fits_in_drafter")
def _input_fits_in_drafter(original, self, common_attn_metadata):
    """Say yes for ISD wherever there is something to draft for."""
    if getattr(self, "isd", None) is not None:
        return common_attn_metadata is not None
    return original(self, common_attn_metadata)


gated_lora = patch(
    "v1-gated-lora",
    _V1,
    "v1", "lora",
    what="GPUModelRunner.set_active_loras maps the draft adapter to the rows of mask slots",
    why="vLLM maps adapters per request; the gate of R-ISD is per row",
    removed_by="a per-token adapter mapping that a proposer can set (vllm#19710, closed)",
)  # fmt: skip
gated_lora.reads("GPUModelRunner.set_active_loras", "input_batch", "num_scheduled_tokens", "num_sampled_tokens")
gated_lora.reads(
    "GPUModelRunner._set_active_loras", "self", "prompt_lora_mapping", "token_lora_mapping", "lora_requests"
)


@gated_lora.wraps("GPUModelRunner.set_active_loras")
def set_active_loras(original, self, input_batch, num_scheduled_tokens, *args, **kwargs):
    """Override the method (of LoRAModelRunnerMixin) where ISD has an adapter."""
    isd = getattr(self, "isd", None)
    num_sampled_tokens = args[0] if args else kwargs.get("num_sampled_tokens")
    if isd is None or isd.draft_lora is None or num_sampled_tokens is None:
        return original(self, input_batch, num_scheduled_tokens, *args, **kwargs)
    if isd.without_lora(input_batch):
        return None
    logits, tokens = isd.lora_mapping(input_batch, num_scheduled_tokens, num_sampled_tokens)
    isd.mapped = bool(tokens.any() or logits.any())
    if isd.base_graph is not None:
        isd.base_graph.use(not tokens.any())
    requests = {isd.draft_lora, *input_batch.lora_id_to_lora_request.values()}
    return self._set_active_loras(tuple(logits.tolist()), tuple(tokens.tolist()), requests)


def keep_draft_lora(entry: Patch) -> None:
    """Enter, into a patch of a runner's module, that the draft adapter is taken out around dummies and put back."""

    @entry.wraps("GPUModelRunner.maybe_setup_dummy_loras")
    @contextlib.contextmanager
    def maybe_setup_dummy_loras(original, self, *args, **kwargs):
        isd = getattr(self, "isd", None)
        held = isd is not None and isd.draft_lora is not None
        if held:
            self.lora_manager.remove_all_adapters()
        with original(self, *args, **kwargs) as given:
            yield given
        if held:
            self.lora_manager.remove_all_adapters()
            isd.load_model(None)


draft_lora_through_profiling = patch(
    "v1-draft-lora-through-profiling",
    _V1,
    "v1", "lora",
    what="GPUModelRunner.maybe_setup_dummy_loras frees the draft adapter's slot for the dummies, then loads it again",
    why="profiling and graph capture fill every slot with dummy adapters and drop all adapters after; the pinned draft "
    "adapter stands in their way, and would be gone",
    removed_by="reserved LoRA slots in vLLM's LoRAConfig (vllm#52038)",
)  # fmt: skip
keep_draft_lora(draft_lora_through_profiling)

logits_processors = patch(
    "logits-processors",
    _V1,
    "v1",
    what="with ISD the runner builds every built-in logits processor (min tokens, logit bias, min p)",
    why="under speculation vLLM builds min tokens alone, because its rejection sampler ignores the others",
    removed_by="a rejection sampler in vLLM that applies every logits processor (vllm#42744, #42802, #38469)",
)
logits_processors.reads("build_logitsprocs", "is_pooling_model", "custom_logitsprocs")
logits_processors.reads("vllm.v1.sample.logits_processor:BUILTIN_LOGITS_PROCESSORS")


@logits_processors.wraps("build_logitsprocs")
def build_logitsprocs(original, vllm_config, device, is_pin_memory, is_pooling_model, *args, **kwargs):
    """Build them all, unless the user has processors of their own, which vLLM refuses."""
    custom = args[0] if args else kwargs.get("custom_logitsprocs")
    if not runs_isd(vllm_config) or custom:
        return original(vllm_config, device, is_pin_memory, is_pooling_model, *args, **kwargs)
    from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS, LogitsProcessors

    return LogitsProcessors(p(vllm_config, device, is_pin_memory) for p in BUILTIN_LOGITS_PROCESSORS)
