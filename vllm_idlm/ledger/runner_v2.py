"""Ledger: Model Runner V2. Each patch does nothing in a runner whose speculator is not ISD's."""

from __future__ import annotations

import functools
from types import ModuleType

from vllm_idlm.ledger.core import expect, expect_source, patch, runs_isd
from vllm_idlm.ledger.runner import attach_attention, keep_draft_lora

_V2 = "vllm.v1.worker.gpu.model_runner"


@patch(
    "v2-speculator",
    _V2,
    what="the runner's init_speculator builds ISD's speculator where the engine runs ISD",
    why="V2 builds its speculators from a closed list of methods; custom_class is not in it",
    removed_by="custom_class (or a registry of speculators) in Model Runner V2",
)
def speculator(module: ModuleType) -> None:
    """Wrap the module's `init_speculator`."""
    original = expect(module, "init_speculator", "vllm_config", "device", "req_states")

    @functools.wraps(original)
    def init_speculator(vllm_config, device, req_states):
        if not runs_isd(vllm_config):
            return original(vllm_config, device, req_states)
        from vllm_idlm.v2.speculator import ISDSpeculator

        return ISDSpeculator(vllm_config, device, req_states)

    module.init_speculator = init_speculator


@patch(
    "v2-attach",
    _V2,
    what="after GPUModelRunner.load_model, ISD's speculator replaces the rejection sampler and takes the LoRA state",
    why="the choice of rejection sampler belongs to the model class there, not to the speculator",
    removed_by="a speculator interface that may bring its rejection sampler",
)
def attach(module: ModuleType) -> None:
    """Wrap `load_model`; the runner's attribute `isd` is the speculator, or absent."""
    runner = module.GPUModelRunner
    original = expect_source(runner, "load_model", "self.rejection_sampler = RejectionSampler(", "self.load_lora_model")

    @functools.wraps(original)
    def load_model(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if runs_isd(self.vllm_config):
            self.isd = self.speculator
            self.isd.attach(self)

    runner.load_model = load_model
    runner.maybe_setup_dummy_loras = keep_draft_lora(runner)


@patch(
    "v2-extra-groups",
    _V2,
    what="after GPUModelRunner.initialize_kv_cache, ISD hooks the engine's attention layers and metadata builders",
    why="groups of mask slots behind each draft are neither numbered on nor attended to causally",
    removed_by="positions and an attention mask of a speculator's own for speculative rows",
)
def extra_groups(module: ModuleType) -> None:
    """Wrap `initialize_kv_cache`; the hooks take effect between `prepare_attn` and the forward."""
    runner = module.GPUModelRunner
    expect_source(runner, "prepare_attn", "compute_slot_mappings(", "input_batch.positions")
    runner.initialize_kv_cache = attach_attention(runner, "self.attn_groups")


@patch(
    "v2-rows",
    _V2,
    what="GPUModelRunner.prepare_inputs tells ISD the layout of the step, before the forward",
    why="which rows are mask slots decides their adapter, and only the device knows how many drafts a request has",
    removed_by="a speculator hook between the preparation of inputs and the forward",
)
def rows(module: ModuleType) -> None:
    """Wrap `prepare_inputs`, and `_set_active_loras` for steps with requests."""
    runner = module.GPUModelRunner
    prepare = expect_source(runner, "prepare_inputs", "self.req_states.draft_tokens", "cu_num_logits=cu_num_logits")
    activate = expect(runner, "_set_active_loras", "self", "prompt_lora_mapping", "token_lora_mapping", "lora_requests")
    expect_source(runner, "execute_model", "self.lora_state.make_lora_inputs(", "self._set_active_loras(*lora_inputs)")

    @functools.wraps(prepare)
    def prepare_inputs(self, *args, **kwargs):
        isd = getattr(self, "isd", None)
        if isd:
            isd.fill_slots()
        batch = prepare(self, *args, **kwargs)
        if isd:
            isd.begin_step(batch)
        return batch

    @functools.wraps(activate)
    def _set_active_loras(self, prompt_lora_mapping, token_lora_mapping, lora_requests, *args, **kwargs):
        if token_lora_mapping is None:  # of vllm_idlm.v2.lora.GatedLoraState
            return self.isd.set_active_loras(prompt_lora_mapping, lora_requests)
        return activate(self, prompt_lora_mapping, token_lora_mapping, lora_requests, *args, **kwargs)

    runner.prepare_inputs, runner._set_active_loras = prepare_inputs, _set_active_loras


@patch(
    "v2-counts",
    _V2,
    what="with ISD the runner's AsyncOutput also brings home how many drafts each request had",
    why="the scheduler knows slots only; its metrics must count real drafts, which only the device knows",
    removed_by="a field for the number of valid drafts in ModelRunnerOutput",
)
def counts(module: ModuleType) -> None:
    """Wrap `sample_tokens` to name the engine at hand, and the module's `AsyncOutput` to take its counts along."""
    runner = module.GPUModelRunner
    sample = expect_source(runner, "sample_tokens", "async_output = AsyncOutput(")
    original = expect(module, "AsyncOutput")
    expect(original, "get_output", "self")
    at_hand: list = []

    @functools.wraps(sample)
    def sample_tokens(self, *args, **kwargs):
        at_hand[:] = [getattr(self, "isd", None)]
        try:
            return sample(self, *args, **kwargs)
        finally:
            at_hand.clear()

    @functools.wraps(original, updated=())
    def output(*args, **kwargs):
        if not at_hand or at_hand[0] is None or at_hand[0].step is None:
            return original(*args, **kwargs)
        from vllm_idlm.v2.output import counting

        return counting(original)(at_hand[0], *args, **kwargs)

    runner.sample_tokens, module.AsyncOutput = sample_tokens, output


@patch(
    "v2-graphs-by-width",
    "vllm.v1.worker.gpu.cudagraph_utils",
    what="CudaGraphManager captures full graphs for every width of rows that ISD's auto chooses from, and offers each "
    "step those of its own width",
    why="it knows the widths of a schedule by batch size only, and offers the graphs of the next size alone, whatever "
    "width they are for",
    removed_by="captures of several query lengths at all batch sizes, and candidates by query length, in vLLM",
)
def graphs_by_width(module: ModuleType) -> None:
    """Wrap `_init_candidates`, which lists what to capture and, by tokens of a step, the graphs that may do for it."""
    manager = module.CudaGraphManager
    original = expect_source(
        manager, "_init_candidates", "self._candidates.setdefault(key, []).extend(matching)", "self._capture_descs[mode"
    )

    @functools.wraps(original)
    def _init_candidates(self):
        original(self)
        if runs_isd(self.vllm_config):
            from vllm_idlm.v2 import graphs

            graphs.extend(self, module.CUDAGraphMode.FULL)

    manager._init_candidates = _init_candidates
