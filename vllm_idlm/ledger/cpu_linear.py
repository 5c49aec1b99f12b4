"""Ledger: the products of the model's weights on vLLM's CPU build."""

from __future__ import annotations

import functools
from types import ModuleType

from vllm_idlm.ledger.core import expect_source, patch, runs_isd


@patch(
    "cpu-linear",
    "vllm.model_executor.layers.utils",
    what="dispatch_cpu_unquantized_gemm gives the layers of an engine with ISD our product (setting cpu_linear)",
    why="on processors without instructions for bfloat16 oneDNN takes two to three times as long for a few rows as for "
    "one, so that verifying them costs more than decoding plainly",
    removed_by="a CPU product in vLLM that is bound by memory for a few rows",
)
def cpu_linear(module: ModuleType) -> None:
    """Wrap the function, which vLLM calls for each layer once its weights are loaded; other weights keep vLLM's."""
    original = expect_source(module, "dispatch_cpu_unquantized_gemm", "layer.cpu_linear = ", "layer.weight.is_meta")
    expect_source(module, "cpu_unquantized_gemm", "layer.cpu_linear(x, weight, bias)")

    @functools.wraps(original)
    def dispatch_cpu_unquantized_gemm(layer, remove_weight):
        from vllm.config import get_current_vllm_config_or_none

        config = get_current_vllm_config_or_none()
        if runs_isd(config):
            from vllm_idlm import cpu_linear, settings

            if settings.of(config).cpu_linear == "rows" and cpu_linear.take(layer):
                return
        original(layer, remove_weight)

    module.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm
