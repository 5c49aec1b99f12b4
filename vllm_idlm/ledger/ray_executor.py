"""Ledger: engines whose workers are Ray actors. What they run instead stands in `vllm_idlm.ray_executor`."""

from __future__ import annotations

import functools
from types import ModuleType

from vllm_idlm.ledger.core import expect, expect_source, patch, runs_isd


@patch(
    "ray-executor",
    "vllm.v1.executor.abstract",
    what="Executor.get_class gives a subclass of vLLM's Ray executor to an engine with ISD: it checks that every node "
    "has the same plugin, and on the CPU platform it counts Ray's CPUs as devices",
    why="a node without the plugin, or with another version, would end in an ImportError in an actor or, worse, in "
    "ranks that disagree; vLLM's CPU platform names no Ray resource and refuses Ray",
    removed_by="plugins that vLLM compares across ranks, and a ray_device_key of the CPU platform",
)
def ray_executor(module: ModuleType) -> None:
    """Wrap the static method `Executor.get_class`; Ray itself is imported only where an engine asks for it."""
    original = expect_source(module.Executor, "get_class", "RayExecutorV2")

    @functools.wraps(original)
    def get_class(vllm_config):
        found = original(vllm_config)
        if not found.uses_ray or not runs_isd(vllm_config):
            return found
        if found.__name__ != "RayExecutorV2":
            raise _another_executor(found.__name__)
        _expect_executor(found)
        from vllm_idlm.ray_executor import ISDRayExecutor

        return ISDRayExecutor

    module.Executor.get_class = staticmethod(get_class)


def _another_executor(name: str) -> Exception:
    """SettingsError for a Ray executor other than RayExecutorV2, such as the older one that vLLM 0.33 removed."""
    from vllm_idlm.settings import SettingsError

    return SettingsError(
        f"method isd runs on vLLM's RayExecutorV2, and this engine would run on {name}. Unset "
        "VLLM_USE_RAY_V2_EXECUTOR_BACKEND (0 chooses vLLM's older Ray executor, which vLLM 0.33 removed)"
    )


def _expect_executor(executor: type) -> None:
    """LedgerError unless vLLM's executor is made as `vllm_idlm.ray_executor` knows it."""
    expect_source(executor, "_init_executor", "initialize_ray_cluster(self.parallel_config", "RayWorkerProc")
    expect(executor, "_get_actor_resource_kwargs")
