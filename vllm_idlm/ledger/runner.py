"""Ledger: Model Runner V1. Each patch does nothing in a runner whose proposer is not ISD's."""

from __future__ import annotations

import functools
from types import ModuleType

from vllm_idlm.ledger.core import expect, expect_source, patch, runs_isd

_V1 = "vllm.v1.worker.gpu_model_runner"


@patch(
    "v1-attach",
    _V1,
    what="after GPUModelRunner.__init__, ISD's proposer takes the runner and replaces its rejection sampler",
    why="a custom_class proposer is given neither the runner nor the logits, and vLLM has no hook for the sampler",
    removed_by="a proposer interface that may bring its rejection sampler and see the target's logits",
)
def attach(module: ModuleType) -> None:
    """Wrap `GPUModelRunner.__init__`; the runner's attribute `isd` is the proposer, or absent."""
    runner = module.GPUModelRunner
    original = expect_source(runner, "__init__", "create_custom_proposer", "self.rejection_sampler = RejectionSampler(")

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):  # noqa: N807
        original(self, *args, **kwargs)
        from vllm_idlm.v1.proposer import ISDProposer

        proposer = getattr(self, "drafter", None)
        if isinstance(proposer, ISDProposer):
            self.isd = proposer
            proposer.attach(self)

    runner.__init__ = __init__


@patch(
    "v1-begin-step",
    _V1,
    what="GPUModelRunner._update_states sees mask token ids where the scheduler says -1, and ISD plans its rows first",
    why="towards the scheduler a mask slot is vLLM's own padding id -1; the model needs the mask token there",
    removed_by="a proposer hook at the start of a step that may fill in speculative token ids",
)
def begin_step(module: ModuleType) -> None:
    """Wrap `_update_states`; the scheduler's own lists are left as they are (in one process they are shared)."""
    runner = module.GPUModelRunner
    original = expect_source(runner, "_update_states", "scheduler_output.scheduled_spec_decode_tokens")

    @functools.wraps(original)
    def _update_states(self, scheduler_output):
        isd = getattr(self, "isd", None)
        if isd is None:
            return original(self, scheduler_output)
        slots = scheduler_output.scheduled_spec_decode_tokens
        scheduler_output.scheduled_spec_decode_tokens = isd.begin_step(scheduler_output)
        try:
            return original(self, scheduler_output)
        finally:
            scheduler_output.scheduled_spec_decode_tokens = slots

    runner._update_states = _update_states


@patch(
    "v1-extra-groups",
    _V1,
    what="ISD hooks the engine's attention layers and metadata builders, and places the rows of extra groups, after "
    "GPUModelRunner.initialize_kv_cache and _prepare_inputs",
    why="vLLM numbers a request's rows on and attends to them causally; groups of mask slots behind each draft do "
    "neither",
    removed_by="positions and an attention mask of a proposer's own for speculative rows",
)
def extra_groups(module: ModuleType) -> None:
    """Wrap `initialize_kv_cache` and `_prepare_inputs`."""
    runner = module.GPUModelRunner
    prepare = expect_source(runner, "_prepare_inputs", "self.positions[:total_num_scheduled_tokens] = (")
    expect_source(runner, "_prepare_inputs", "self.input_batch.block_table.compute_slot_mapping(")

    @functools.wraps(prepare)
    def _prepare_inputs(self, scheduler_output, num_scheduled_tokens):
        result = prepare(self, scheduler_output, num_scheduled_tokens)
        if isd := getattr(self, "isd", None):
            isd.place_extra(num_scheduled_tokens)
        return result

    runner.initialize_kv_cache = attach_attention(runner, "self.initialize_metadata_builders(")
    runner._prepare_inputs = _prepare_inputs


def attach_attention(runner: type, fragment: str):
    """The runner class's `initialize_kv_cache`, after which ISD hooks the attention; its source holds `fragment`."""
    original = expect_source(runner, "initialize_kv_cache", fragment)

    @functools.wraps(original)
    def initialize_kv_cache(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        if isd := getattr(self, "isd", None):
            isd.attach_attention()
        return result

    return initialize_kv_cache


def _warm_up_isd(worker: type):
    """The worker class's `compile_or_warm_up_model`, after which ISD measures the cost of rows."""
    original = expect(worker, "compile_or_warm_up_model", "self")

    @functools.wraps(original)
    def compile_or_warm_up_model(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        if isd := getattr(self.model_runner, "isd", None):
            isd.warm_up()
        return result

    return compile_or_warm_up_model


@patch(
    "v1-warm-up",
    "vllm.v1.worker.gpu_worker",
    what="after Worker.compile_or_warm_up_model, ISD measures what rows cost",
    why="which groups of mask slots pay depends on it, and it is known only once the model is compiled",
    removed_by="a proposer hook after the warm-up",
)
def warm_up(module: ModuleType) -> None:
    """Wrap it in the class that all workers derive from."""
    module.Worker.compile_or_warm_up_model = _warm_up_isd(module.Worker)


@patch(
    "v1-warm-up-cpu",
    "vllm.v1.worker.cpu_worker",
    what="the same in CPUWorker, which has a method of its own",
    why="as v1-warm-up",
    removed_by="a proposer hook after the warm-up",
)
def warm_up_cpu(module: ModuleType) -> None:
    """Wrap it, unless it is the parent's."""
    if "compile_or_warm_up_model" in vars(module.CPUWorker):
        module.CPUWorker.compile_or_warm_up_model = _warm_up_isd(module.CPUWorker)


@patch(
    "v1-row-near-the-end",
    _V1,
    what="GPUModelRunner._input_fits_in_drafter is true for ISD",
    why="it turns drafting off for the whole batch when one request nears max_model_len; ISD's slots are cut "
    "per request by the scheduler, and a proposer that is not called could not keep its records",
    removed_by="a per-request check, or a proposer that declares it needs no check",
)
def row_near_the_end(module: ModuleType) -> None:
    """Wrap `_input_fits_in_drafter`."""
    runner = module.GPUModelRunner
    original = expect(runner, "_input_fits_in_drafter", "self", "common_attn_metadata")

    @functools.wraps(original)
    def _input_fits_in_drafter(self, common_attn_metadata):
        if getattr(self, "isd", None) is not None:
            return common_attn_metadata is not None
        return original(self, common_attn_metadata)

    runner._input_fits_in_drafter = _input_fits_in_drafter


@patch(
    "v1-gated-lora",
    _V1,
    what="GPUModelRunner.set_active_loras maps the draft adapter to the rows of mask slots",
    why="vLLM maps adapters per request; the gate of R-ISD is per row",
    removed_by="a per-token adapter mapping that a proposer can set",
)
def gated_lora(module: ModuleType) -> None:
    """Override `set_active_loras` (from LoRAModelRunnerMixin) in the runner."""
    runner = module.GPUModelRunner
    original = expect(runner, "set_active_loras", "self", "input_batch", "num_scheduled_tokens", "num_sampled_tokens")
    expect(runner, "_set_active_loras", "self", "prompt_lora_mapping", "token_lora_mapping", "lora_requests")

    @functools.wraps(original)
    def set_active_loras(self, input_batch, num_scheduled_tokens, num_sampled_tokens=None, *args, **kwargs):
        isd = getattr(self, "isd", None)
        if isd is None or isd.draft_lora is None or num_sampled_tokens is None:
            return original(self, input_batch, num_scheduled_tokens, num_sampled_tokens, *args, **kwargs)
        if isd.without_lora(input_batch):
            return None
        logits, tokens = isd.lora_mapping(input_batch, num_scheduled_tokens, num_sampled_tokens)
        isd.mapped = bool(tokens.any() or logits.any())
        if isd.base_graph is not None:
            isd.base_graph.use(not tokens.any())
        requests = {isd.draft_lora, *input_batch.lora_id_to_lora_request.values()}
        return self._set_active_loras(tuple(logits.tolist()), tuple(tokens.tolist()), requests)

    runner.set_active_loras = set_active_loras


@patch(
    "v1-draft-lora-through-profiling",
    _V1,
    what="GPUModelRunner.maybe_setup_dummy_loras frees the draft adapter's slot for the dummies, then loads it again",
    why="profiling and graph capture fill every slot with dummy adapters and drop all adapters after; the pinned draft "
    "adapter stands in their way, and would be gone",
    removed_by="reserved LoRA slots in vLLM's LoRAConfig",
)
def draft_lora_through_profiling(module: ModuleType) -> None:
    """Replace `maybe_setup_dummy_loras` (from LoRAModelRunnerMixin) in the runner."""
    module.GPUModelRunner.maybe_setup_dummy_loras = keep_draft_lora(module.GPUModelRunner)


def keep_draft_lora(runner: type):
    """The runner class's `maybe_setup_dummy_loras`, around which the draft adapter is taken out and put back."""
    import contextlib

    original = expect(runner, "maybe_setup_dummy_loras", "self", "lora_config", "remove_lora")

    @contextlib.contextmanager
    @functools.wraps(original)
    def maybe_setup_dummy_loras(self, lora_config, remove_lora=True):
        isd = getattr(self, "isd", None)
        held = isd is not None and isd.draft_lora is not None
        if held:
            self.lora_manager.remove_all_adapters()
        with original(self, lora_config, remove_lora):
            yield
        if held:
            self.lora_manager.remove_all_adapters()
            isd.load_model(None)

    return maybe_setup_dummy_loras


@patch(
    "logits-processors",
    _V1,
    what="with ISD the runner builds every built-in logits processor (min tokens, logit bias, min p)",
    why="under speculation vLLM builds min tokens alone, because its rejection sampler ignores the others",
    removed_by="a rejection sampler in vLLM that applies every logits processor",
)
def logits_processors(module: ModuleType) -> None:
    """Wrap the runner module's `build_logitsprocs`."""
    original = expect(module, "build_logitsprocs", "vllm_config", "device", "is_pin_memory", "is_pooling_model")

    @functools.wraps(original)
    def build_logitsprocs(vllm_config, device, is_pin_memory, is_pooling_model, custom_logitsprocs=()):
        if not runs_isd(vllm_config) or custom_logitsprocs:
            return original(vllm_config, device, is_pin_memory, is_pooling_model, custom_logitsprocs)
        from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS, LogitsProcessors

        return LogitsProcessors(p(vllm_config, device, is_pin_memory) for p in BUILTIN_LOGITS_PROCESSORS)

    module.build_logitsprocs = build_logitsprocs


@patch(
    "cpu-seeded-chunks",
    _V1,
    what="on the CPU a seeded request's generator is put back after a prompt chunk by its state, not by its offset",
    why="a CPU generator has no offset: a seeded request with a chunked prompt kills vLLM's CPU engine (plain too)",
    removed_by="GPUModelRunner._bookkeeping_sync not calling get_offset on CPU generators",
)
def cpu_seeded_chunks(module: ModuleType) -> None:
    """Wrap `_sample` and `_bookkeeping_sync`, in runners with ISD on a device whose generators have no offset."""
    runner = module.GPUModelRunner
    sample = expect(runner, "_sample", "self", "logits", "spec_decode_metadata")
    bookkeeping = expect_source(runner, "_bookkeeping_sync", "gen.get_offset()")

    def unfinished(self) -> list[int]:
        """Seeded requests of this step that are still in their prompt: their draw does not count."""
        if getattr(self, "isd", None) is None or not _generators_lack_offset(self.device):
            return []
        discard = self.discard_request_mask.np[: self.input_batch.num_reqs]
        return [i for i in discard.nonzero()[0].tolist() if i in self.input_batch.generators]

    @functools.wraps(sample)
    def _sample(self, *args, **kwargs):
        states = {i: self.input_batch.generators[i].get_state() for i in unfinished(self)}
        output = sample(self, *args, **kwargs)
        for i, state in states.items():
            self.input_batch.generators[i].set_state(state)
        return output

    @functools.wraps(bookkeeping)
    def _bookkeeping_sync(self, *args, **kwargs):
        hidden = {i: self.input_batch.generators.pop(i) for i in unfinished(self)}
        try:
            return bookkeeping(self, *args, **kwargs)
        finally:
            self.input_batch.generators.update(hidden)

    runner._sample, runner._bookkeeping_sync = _sample, _bookkeeping_sync


@functools.cache
def _generators_lack_offset(device) -> bool:
    """The self-test of `cpu-seeded-chunks`: whether this device's generators refuse `get_offset`."""
    import torch

    if device.type != "cpu":
        return False
    try:
        torch.Generator(device).get_offset()
    except RuntimeError:
        return True
    return False
