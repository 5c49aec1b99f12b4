"""Ledger: Model Runner V2. Each patch does nothing in a runner whose speculator is not ISD's."""

from __future__ import annotations

import threading

from vllm_idlm.ledger.runner_v1 import hook_attention, keep_draft_lora
from vllm_idlm.patching import of_isd, patch, runs_isd

_V2 = "vllm.v1.worker.gpu.model_runner"

speculator = patch(
    "v2-speculator",
    _V2,
    "v2",
    what="the runner's init_speculator builds ISD's speculator where the engine runs ISD",
    why="V2 builds its speculators from a closed list of methods; custom_class is not in it",
    removed_by="custom_class (or a registry of speculators) in Model Runner V2 (vllm#36219)",
)


@speculator.wraps("init_speculator")
def init_speculator(original, vllm_config, device, req_states):
    """Build ours for an engine with ISD."""
    if not runs_isd(vllm_config):
        return original(vllm_config, device, req_states)
    from vllm_idlm.v2.speculator import ISDSpeculator

    return ISDSpeculator(vllm_config, device, req_states)


attach = patch(
    "v2-attach",
    _V2,
    "v2",
    what="after GPUModelRunner.load_model, ISD's speculator replaces the rejection sampler and the sampler",
    why="the choice of rejection sampler belongs to the model class there, not to the speculator",
    removed_by="a speculator interface that may bring its rejection sampler",
)


@attach.wraps("GPUModelRunner.load_model", holds=("self.rejection_sampler = RejectionSampler(",))
def load_model(original, self, *args, **kwargs):
    """Set the runner's attribute `isd` to the speculator, if it is ISD's; else there is no such attribute."""
    result = original(self, *args, **kwargs)
    if of_isd(self):
        self.isd = self.speculator
        self.isd.attach(self)
    return result


draft_lora = patch(
    "v2-draft-lora",
    _V2,
    "v2", "lora",
    what="ISD's speculator takes the runner's LoRA state, and the draft adapter's slot is freed for dummies, then "
    "filled again",
    why="as v1-draft-lora-through-profiling; and the draft adapter is active in every step",
    removed_by="reserved LoRA slots in vLLM's LoRAConfig (vllm#52038)",
)  # fmt: skip
draft_lora.reads("GPUModelRunner.load_model", holds=("self.load_lora_model",))
keep_draft_lora(draft_lora)

extra_groups = patch(
    "v2-extra-groups",
    _V2,
    "v2", "groups",
    what="after GPUModelRunner.initialize_kv_cache, ISD hooks the engine's attention layers and metadata builders",
    why="groups of mask slots behind each draft are neither numbered on nor attended to causally",
    removed_by="positions and an attention mask of a speculator's own for speculative rows",
)  # fmt: skip
extra_groups.reads("GPUModelRunner.prepare_attn", holds=("compute_slot_mappings(", "input_batch.positions"))
hook_attention(extra_groups, "self.attn_groups")

profile = patch(
    "v2-profile",
    _V2,
    "v2",
    what="GPUModelRunner._dummy_sampler_run, part of vLLM's profile of memory, also takes ISD's heaviest step",
    why="vLLM profiles one row of logits a request; ISD has logits in every row of every request, gigabytes at many "
    "requests, and would run out of memory in service",
    removed_by="a profile of memory with num_speculative_tokens rows of logits a request",
)


@profile.wraps("GPUModelRunner._dummy_sampler_run")
def _dummy_sampler_run(original, self, hidden_states):
    """Take and free what ISD needs, behind vLLM's own sampling."""
    result = original(self, hidden_states)
    if isd := getattr(self, "isd", None):
        isd.profile(hidden_states)
    return result


rows = patch(
    "v2-rows",
    _V2,
    "v2",
    what="GPUModelRunner.prepare_inputs tells ISD the layout of the step, before the forward",
    why="which rows are mask slots decides their adapter, and only the device knows how many drafts a request has",
    removed_by="a speculator hook between the preparation of inputs and the forward",
)


@rows.wraps("GPUModelRunner.prepare_inputs", holds=("self.req_states.draft_tokens", "cu_num_logits=cu_num_logits"))
def prepare_inputs(original, self, *args, **kwargs):
    """Fill the mask tokens in before, and begin ISD's step behind."""
    isd = getattr(self, "isd", None)
    if isd:
        isd.fill_slots()
    batch = original(self, *args, **kwargs)
    if isd:
        isd.begin_step(batch)
    return batch


row_lora = patch(
    "v2-row-lora",
    _V2,
    "v2", "lora",
    what="GPUModelRunner._set_active_loras lets ISD map each row of a step with requests to its adapter, on the device",
    why="vLLM maps adapters per request, on the host; the gate of R-ISD is per row, and only the device knows the rows",
    removed_by="a per-token adapter mapping that a speculator can set (vllm#55947 has one for a draft-only adapter)",
)  # fmt: skip
row_lora.reads(
    "GPUModelRunner.execute_model",
    holds=("self.lora_state.make_lora_inputs(", "self._set_active_loras(*lora_inputs)"),
)


@row_lora.wraps("GPUModelRunner._set_active_loras")
def _set_active_loras(original, self, prompt_lora_mapping, token_lora_mapping, lora_requests, *args, **kwargs):
    """Ask ISD where there is no mapping by tokens, as `vllm_idlm.v2.lora.GatedLoraState` gives none."""
    if token_lora_mapping is None and getattr(self, "isd", None):
        return self.isd.set_active_loras(prompt_lora_mapping, lora_requests)
    return original(self, prompt_lora_mapping, token_lora_mapping, lora_requests, *args, **kwargs)


counts = patch(
    "v2-counts",
    _V2,
    "v2",
    what="with ISD the runner's AsyncOutput also brings home how many drafts each request had",
    why="the scheduler knows slots only; its metrics must count real drafts, which only the device knows",
    removed_by="a field for the number of valid drafts in ModelRunnerOutput",
)
counts.reads("AsyncOutput.get_output", "self")
counts.reads("AsyncOutput.__init__", "main_stream", "copy_stream")
counts.reads("AsyncOutput", fields=("copy_event",))
_AT_HAND = threading.local()  # .isd: of the runner whose tokens this thread samples


@counts.wraps("GPUModelRunner.sample_tokens", holds=("async_output = AsyncOutput(",))
def sample_tokens(original, self, *args, **kwargs):
    """Name the engine at hand while vLLM makes its output."""
    _AT_HAND.isd = getattr(self, "isd", None)
    try:
        return original(self, *args, **kwargs)
    finally:
        _AT_HAND.isd = None


@counts.wraps("AsyncOutput")
def output(original, *args, **kwargs):
    """Make an output that takes ISD's counts along, where a step of ISD's is at hand."""
    isd = getattr(_AT_HAND, "isd", None)
    if isd is None or isd.step is None:
        return original(*args, **kwargs)
    from vllm_idlm.v2.output import counting

    return counting(original)(isd, *args, **kwargs)


graphs_by_width = patch(
    "v2-graphs-by-width",
    "vllm.v1.worker.gpu.cudagraph_utils",
    "v2",
    what="CudaGraphManager captures full graphs for every width of rows that ISD's auto chooses from, and offers each "
    "step those of its own width",
    why="it knows the widths of a schedule by batch size only, and offers the graphs of the next size alone, whatever "
    "width they are for",
    removed_by="captures of several query lengths at all batch sizes, and candidates by query length (vllm#56136)",
)
graphs_by_width.reads("CudaGraphManager", fields=("_candidates", "_capture_descs", "varlen_decode", "max_num_reqs"))
graphs_by_width.reads("BatchExecutionDescriptor", fields=("cg_mode", "num_tokens", "num_reqs", "uniform_token_count"))


@graphs_by_width.wraps(
    "CudaGraphManager._init_candidates",
    holds=("self._candidates.setdefault(key, []).extend(matching)", "self._capture_descs[mode"),
)
def _init_candidates(original, self):
    """List what to capture and, by tokens of a step, the graphs that may do for it, in ISD's way."""
    result = original(self)
    if of_isd(self):
        from vllm.config import CUDAGraphMode

        from vllm_idlm.v2 import graphs

        graphs.extend(self, CUDAGraphMode.FULL)
    return result
