"""Ledger: vLLM's cache of the compiled model on the CPU build, which is written at every start and never read."""

from __future__ import annotations

import functools
from types import ModuleType

from vllm_idlm.ledger.core import expect_source, patch, runs_isd


@patch(
    "cpu-compile-cache",
    "vllm.compilation.decorators",
    what="a compiled model that vLLM has cached on CPU loads: the loaded object gets the `finalize_loading` it lacks",
    why="only what vLLM's own backend compiles has that method, on CPU the backend is inductor; the AttributeError "
    "makes every start compile again, a minute and more",
    removed_by="a check in _try_load_aot_compiled_fn for what finalize_loading is for",
)
def cpu_compile_cache(module: ModuleType) -> None:
    """Wrap `_try_load_aot_compiled_fn`: for an engine with ISD, and where the method is missing, it does nothing."""
    original = expect_source(module, "_try_load_aot_compiled_fn", "compiled_fn.finalize_loading(model.vllm_config)")

    @functools.wraps(original)
    def _try_load_aot_compiled_fn(model, *args, **kwargs):
        from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable as Loaded
        from vllm.platforms import current_platform

        if not runs_isd(model.vllm_config) or not current_platform.is_cpu() or hasattr(Loaded, "finalize_loading"):
            return original(model, *args, **kwargs)
        Loaded.finalize_loading = lambda self, vllm_config: None
        try:
            return original(model, *args, **kwargs)
        finally:
            del Loaded.finalize_loading

    module._try_load_aot_compiled_fn = _try_load_aot_compiled_fn
