"""Ledger: vLLM's CPU build, in engines that run ISD: LoRA of selected rows, products of few rows, its faults."""

from __future__ import annotations

import functools
import logging

from vllm_idlm.patching import of_isd, patch, runs_isd

WRAPPER = "vllm_idlm.punica.RowPunicaWrapper"
log = logging.getLogger(__name__)
_CPU = "vllm.platforms.cpu"
_V1 = "vllm.v1.worker.gpu_model_runner"


def _current_config():
    """The configuration that vLLM builds something under, None if there is none (or vLLM has no such function)."""
    try:
        from vllm.config import get_current_vllm_config_or_none
    except ImportError:
        return None
    return get_current_vllm_config_or_none()


row_lora = patch(
    "cpu-row-lora",
    _CPU,
    "cpu", "lora",
    what="CpuPlatform.get_punica_wrapper names our wrapper while an engine with ISD builds its LoRA layers",
    why="vLLM's CPU LoRA overflows on alternating rows and copies the weights for every token, and that of 0.32 adds "
    "the last slot's adapter to rows that have none (vllm#48421); a gated adapter needs the clean rows untouched and "
    "the others cheap",
    removed_by="a CPU LoRA kernel in vLLM that selects rows and keeps no run lengths",
)  # fmt: skip
row_lora.reads(
    "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU",
    fields=(
        "_token_lora_indices", "_sampler_indices", "_embeddings_indices", "indices_len", "is_prefill", "no_lora",
        "update_metadata", "add_lora_linear", "add_lora_logits", "add_lora_embedding", "add_shrink", "add_expand",
    ),
)  # fmt: skip
row_lora.reads("vllm.config:get_current_vllm_config_or_none")
row_lora.reads("vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA",
               fields=("lora_a_stacked", "lora_b_stacked", "output_slices"))  # fmt: skip
row_lora.reads("vllm.lora.layers.logits_processor:LogitsProcessorWithLoRA", fields=("lora_b_stacked",))


@row_lora.wraps("CpuPlatform.get_punica_wrapper")
def get_punica_wrapper(original, cls):
    """Name our wrapper; called while the worker's configuration is current."""
    if not runs_isd(_current_config()):
        return original(cls)
    fault = "changes rows without an adapter" if stock_touches_other_rows() else "is slow, and fits few rows"
    log.info("LoRA runs on selected rows (ledger: cpu-row-lora); vLLM's own CPU LoRA %s here", fault)
    return WRAPPER


compiled_lora = patch(
    "cpu-compiled-lora",
    _CPU,
    "cpu", "lora",
    what="CpuPlatform.check_and_update_config leaves torch.compile on with LoRA when the engine runs ISD",
    why="vLLM's CPU LoRA cannot be traced, so vLLM turns the compiler off; ours is one op that can, and eager mode "
    "nearly doubles the time of a forward",
    removed_by="a CPU LoRA in vLLM that torch.compile can trace",
    optional=True,
)  # fmt: skip


@compiled_lora.wraps(
    "CpuPlatform.check_and_update_config",
    holds=("CompilationMode.DYNAMO_TRACE_ONCE", "vllm_config.lora_config is not None", "CompilationMode.NONE"),
)
def check_and_update_config(original, cls, vllm_config):
    """Give back the compilation mode that the engine has without LoRA."""
    if not runs_isd(vllm_config) or vllm_config.lora_config is None:
        return original(cls, vllm_config)
    from vllm.config import CompilationMode

    asked = vllm_config.compilation_config.mode
    original(cls, vllm_config)
    once = asked == CompilationMode.VLLM_COMPILE  # which is what CPU makes of it
    vllm_config.compilation_config.mode = CompilationMode.DYNAMO_TRACE_ONCE if once else asked
    return None


layer_view = patch(
    "lora-layer-view",
    "vllm.lora.layers.base",
    "cpu", "lora",
    what="BaseLayerWithLoRA.set_mapping gives each layer the view of our wrapper that knows the layer's weights",
    why="as arguments, 14 weight tensors a transformer layer cost more to pass than a step's update costs to compute",
    removed_by="a CPU LoRA kernel in vLLM that selects rows",
    optional=True,
)  # fmt: skip


@layer_view.wraps("BaseLayerWithLoRA.set_mapping")
def set_mapping(original, self, punica_wrapper):
    """Pass the layer's view on; any other wrapper, so any engine without ISD, passes through unchanged."""
    view = getattr(punica_wrapper, "for_layer", None)
    return original(self, view(self) if view else punica_wrapper)


def stock_touches_other_rows() -> bool:
    """Self-test: whether vLLM's own CPU wrapper changes a row without an adapter that shares a batch with one with."""
    import torch
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    wrapper = PunicaWrapperCPU(8, 8, "cpu")
    wrapper.update_metadata(LoRAMapping((0, 1), (0, 1), is_prefill=True), [1], 2, 8)
    a, b = torch.ones(1, 1, 1, 4), torch.ones(1, 1, 4, 1)
    y = torch.zeros(2, 4)
    wrapper.add_lora_linear(y, torch.ones(2, 4), (a,), (b,), 1.0, (4,))
    return bool(y[0].any())


products = patch(
    "cpu-linear",
    "vllm.model_executor.layers.utils",
    "cpu", "rows",
    what="dispatch_cpu_unquantized_gemm gives the layers of an engine with ISD our product (it sets layer.cpu_linear)",
    why="on processors without instructions for bfloat16 oneDNN takes two to three times as long for a few rows as for "
    "one, so that verifying them costs more than decoding plainly",
    removed_by="a CPU product in vLLM that is bound by memory for a few rows",
)  # fmt: skip
products.reads("vllm.config:get_current_vllm_config_or_none")
products.reads("cpu_unquantized_gemm", holds=("layer.cpu_linear(x, weight, bias)",))


@products.wraps("dispatch_cpu_unquantized_gemm", holds=("layer.cpu_linear = ", "layer.weight.is_meta"))
def dispatch_cpu_unquantized_gemm(original, layer, remove_weight):
    """Give a layer our product; vLLM calls it for each once its weights are loaded. Other weights keep vLLM's."""
    config = _current_config()
    if runs_isd(config):
        from vllm_idlm import cpu_linear, settings

        if settings.of(config).cpu_linear == "rows" and cpu_linear.take(layer):
            return None
    return original(layer, remove_weight)


compile_cache = patch(
    "cpu-compile-cache",
    "vllm.compilation.decorators",
    "cpu",
    what="a compiled model that vLLM has cached on CPU loads: the loaded object gets the `finalize_loading` it lacks",
    why="only what vLLM's own backend compiles has that method, on CPU the backend is inductor; the AttributeError "
    "makes every start compile again, a minute and more",
    removed_by="a check in _try_load_aot_compiled_fn for what finalize_loading is for",
    optional=True,
)


@compile_cache.wraps("_try_load_aot_compiled_fn", holds=("compiled_fn.finalize_loading(model.vllm_config)",))
def _try_load_aot_compiled_fn(original, model, *args, **kwargs):
    """Let the method do nothing, for an engine with ISD and where it is missing."""
    if not of_isd(model):
        return original(model, *args, **kwargs)
    from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable as Loaded
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or hasattr(Loaded, "finalize_loading"):
        return original(model, *args, **kwargs)
    Loaded.finalize_loading = lambda self, vllm_config: None
    try:
        return original(model, *args, **kwargs)
    finally:
        del Loaded.finalize_loading


seeded_chunks = patch(
    "cpu-seeded-chunks",
    _V1,
    "cpu", "v1",
    what="on the CPU a seeded request's generator is put back after a prompt chunk by its state, not by its offset",
    why="a CPU generator has no offset: a seeded request with a chunked prompt kills vLLM's CPU engine (plain too)",
    removed_by="GPUModelRunner._bookkeeping_sync not calling get_offset on CPU generators",
)  # fmt: skip


@seeded_chunks.wraps("GPUModelRunner._sample")
def _sample(original, self, *args, **kwargs):
    """Draw, and put the generators of unfinished prompts back to where they were."""
    states = {i: self.input_batch.generators[i].get_state() for i in _unfinished(self)}
    output = original(self, *args, **kwargs)
    for i, state in states.items():
        self.input_batch.generators[i].set_state(state)
    return output


@seeded_chunks.wraps("GPUModelRunner._bookkeeping_sync", holds=("gen.get_offset()",))
def _bookkeeping_sync(original, self, *args, **kwargs):
    """Hide the generators of unfinished prompts, which vLLM would set back by their offset."""
    hidden = {i: self.input_batch.generators.pop(i) for i in _unfinished(self)}
    if not hidden:
        return original(self, *args, **kwargs)
    try:
        return original(self, *args, **kwargs)
    finally:
        self.input_batch.generators.update(hidden)


def _unfinished(runner) -> list[int]:
    """Seeded requests of this step that are still in their prompt, on a device without offsets: their draw is none."""
    if getattr(runner, "isd", None) is None or not generators_lack_offset(runner.device):
        return []
    discard = runner.discard_request_mask.np[: runner.input_batch.num_reqs]
    return [i for i in discard.nonzero()[0].tolist() if i in runner.input_batch.generators]


@functools.cache
def generators_lack_offset(device) -> bool:
    """The self-test of `cpu-seeded-chunks`: whether this device's generators refuse `get_offset`."""
    import torch

    if device.type != "cpu":
        return False
    try:
        torch.Generator(device).get_offset()
    except RuntimeError:
        return True
    return False
