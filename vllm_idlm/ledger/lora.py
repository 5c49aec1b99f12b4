"""Ledger: LoRA of selected rows on vLLM's CPU build, for engines that run ISD; any other engine keeps vLLM's own."""

from __future__ import annotations

import functools
import logging
from types import ModuleType

from vllm_idlm.ledger.core import expect, expect_source, patch, runs_isd

WRAPPER = "vllm_idlm.punica.RowPunicaWrapper"
log = logging.getLogger(__name__)
_CPU = "vllm.platforms.cpu"


@patch(
    "cpu-row-lora",
    _CPU,
    what="CpuPlatform.get_punica_wrapper names our wrapper while an engine with ISD builds its LoRA layers",
    why="vLLM's CPU LoRA adds the last slot's adapter to rows that have none, overflows on alternating rows and copies "
    "the weights for every token; a gated adapter needs the clean rows untouched and the others cheap",
    removed_by="a CPU LoRA kernel in vLLM that selects rows",
)
def cpu_row_lora(module: ModuleType) -> None:
    """Wrap the class method `get_punica_wrapper`, which is called while the worker's configuration is current."""
    platform = module.CpuPlatform
    original = expect(platform, "get_punica_wrapper", "cls")

    @functools.wraps(original)
    def get_punica_wrapper(cls):
        from vllm.config import get_current_vllm_config_or_none

        if not runs_isd(get_current_vllm_config_or_none()):
            return original(cls)
        fault = "changes rows without an adapter" if stock_touches_other_rows() else "is right, but slow"
        log.info("LoRA runs on selected rows (ledger: cpu-row-lora); vLLM's own CPU LoRA %s here", fault)
        return WRAPPER

    platform.get_punica_wrapper = classmethod(get_punica_wrapper)


@patch(
    "cpu-compiled-lora",
    _CPU,
    what="CpuPlatform.check_and_update_config leaves torch.compile on with LoRA when the engine runs ISD",
    why="vLLM's CPU LoRA cannot be traced, so vLLM turns the compiler off; ours is one op that can, and eager mode "
    "nearly doubles the time of a forward",
    removed_by="a CPU LoRA in vLLM that torch.compile can trace",
)
def cpu_compiled_lora(module: ModuleType) -> None:
    """Wrap the class method `check_and_update_config`: give back the compilation mode it has without LoRA."""
    platform = module.CpuPlatform
    original = expect_source(
        platform,
        "check_and_update_config",
        "compilation_config.mode = CompilationMode.DYNAMO_TRACE_ONCE",
        "if vllm_config.lora_config is not None:\n            compilation_config.mode = CompilationMode.NONE\n",
    )

    @functools.wraps(original)
    def check_and_update_config(cls, vllm_config):
        from vllm.config import CompilationMode

        asked = vllm_config.compilation_config.mode
        original(cls, vllm_config)
        if vllm_config.lora_config is not None and runs_isd(vllm_config):
            once = asked == CompilationMode.VLLM_COMPILE  # which is what CPU makes of it
            vllm_config.compilation_config.mode = CompilationMode.DYNAMO_TRACE_ONCE if once else asked

    platform.check_and_update_config = classmethod(check_and_update_config)


@patch(
    "lora-layer-view",
    "vllm.lora.layers.base",
    what="BaseLayerWithLoRA.set_mapping gives each layer the view of our wrapper that knows the layer's weights",
    why="as arguments, 14 weight tensors a transformer layer cost more to pass than a step's update costs to compute",
    removed_by="a CPU LoRA kernel in vLLM that selects rows",
)
def lora_layer_view(module: ModuleType) -> None:
    """Wrap `set_mapping`; any other wrapper, so any engine without ISD, passes through unchanged."""
    layer = module.BaseLayerWithLoRA
    original = expect(layer, "set_mapping", "self", "punica_wrapper")

    @functools.wraps(original)
    def set_mapping(self, punica_wrapper):
        view = getattr(punica_wrapper, "for_layer", None)
        original(self, view(self) if view else punica_wrapper)

    layer.set_mapping = set_mapping


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
