"""The model compiled a second time, without LoRA, for steps in which no row has an adapter.

A gated adapter works at mask slots only; a step without any (`auto` decodes plainly under load, a `schedule` may) still
paid for the LoRA calls that are part of the compiled graph: 120 of them in a model of 30 layers, a tenth of a CPU's
step. The second graph belongs to a shallow copy of the compiled module: the same submodules, hence the same weights.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections.abc import Iterator
from typing import Any

import torch

from vllm_idlm import patching
from vllm_idlm.settings import KEY, ISDSettings

log = logging.getLogger("vllm.idlm")


def wanted(settings: ISDSettings) -> bool:
    """Whether an engine with these settings comes to steps without mask slots, other than by requests that opt out."""
    if patching.left_out("object-v1-second-graph"):
        return False
    return settings.coverage == "auto" or any(stride == 1 for *_, stride in settings.schedule or [])


class BaseGraph:
    """Chooses between the two graphs of one engine's model."""

    def __init__(self, runner: Any) -> None:
        """runner: Model Runner V1 on the CPU, warmed up. Compiles the second graph, or loads it from vLLM's cache."""
        self._twins: list[tuple[torch.nn.Module, str, torch.nn.Module, torch.nn.Module]] = []
        wrapper = next((m.punica_wrapper for m in runner.model.modules() if hasattr(m, "punica_wrapper")), None)
        if not hasattr(wrapper, "without_lora"):
            return
        began = time.perf_counter()
        self._twins = [(parent, name, module, _twin(module)) for parent, name, module in _compiled(runner.model)]
        if self._twins:
            with wrapper.without_lora():
                self.use(True)
                _first_run(runner)
            self.use(False)
            log.info("ISD: the model without LoRA compiled in %.1f s", time.perf_counter() - began)

    def use(self, base: bool) -> bool:
        """The next forward is to be the base model's (no row of it has an adapter), or the one with LoRA.

        False where there is no graph but the one with LoRA.
        """
        for parent, name, module, twin in self._twins:
            parent._modules[name] = twin if base else module
        return bool(self._twins)


def _compiled(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Module]]:
    """The modules that vLLM compiles, with their parents and their names there."""
    from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper

    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, TorchCompileWithNoGuardsWrapper) and not module.do_not_compile:
                yield parent, name, module


def _twin(module: Any) -> Any:
    """A copy of a compiled module that shares all but its graph, and compiles (and caches) one of its own."""
    from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
    from vllm.config import set_current_vllm_config

    twin = copy.copy(module)
    config = twin.vllm_config
    # The key of vLLM's cache is a hash of its configuration, which this entry makes another one.
    marked = {**config.additional_config, KEY + "-graph": "without LoRA"}
    twin.vllm_config = copy.copy(config)
    twin.vllm_config.additional_config = marked
    twin.aot_compiled_fn, twin.was_aot_compile_fn_loaded_from_disk, twin.compiled = None, False, False
    with set_current_vllm_config(twin.vllm_config):
        TorchCompileWithNoGuardsWrapper.__init__(twin, compile_prefix=twin._compile_prefix, is_encoder=twin._is_encoder)
    return twin


def _first_run(runner: Any) -> None:
    """Call the model at the size that vLLM's own warm-up compiles for."""
    from vllm.forward_context import set_forward_context

    rows = runner.max_num_tokens
    ids = torch.zeros(rows, dtype=torch.int32, device=runner.device)
    places = torch.zeros(rows, dtype=torch.int64, device=runner.device)
    with torch.inference_mode(), set_forward_context(None, runner.vllm_config, num_tokens=rows), _quietly(runner):
        runner.model(input_ids=ids, positions=places, intermediate_tensors=None, inputs_embeds=None)


@contextlib.contextmanager
def _quietly(runner: Any) -> Iterator[None]:
    """vLLM's settings of inductor for the CPU, as its own warm-up has them."""
    from vllm.v1.worker import cpu_model_runner

    with cpu_model_runner._set_global_compilation_settings(runner.vllm_config):
        yield
