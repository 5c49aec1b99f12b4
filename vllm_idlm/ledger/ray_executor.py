"""Ledger: engines whose workers are Ray actors. What they run instead stands in `vllm_idlm.ray_executor`."""

from __future__ import annotations

import functools
from types import ModuleType

from vllm_idlm.ledger.core import expect, expect_source, patch, refuse, runs_isd


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
    original = expect_source(module.Executor, "get_class", "RayExecutorV2", "RayDistributedExecutor")

    @functools.wraps(original)
    def get_class(vllm_config):
        found = original(vllm_config)
        if not found.uses_ray or not runs_isd(vllm_config):
            return found
        _expect_executor(found)
        from vllm_idlm import ray_executor as ours

        return {"RayExecutorV2": ours.ISDRayExecutor, "RayDistributedExecutor": ours.ISDRayDistributedExecutor}[
            found.__name__
        ]

    module.Executor.get_class = staticmethod(get_class)


def _expect_executor(executor: type) -> None:
    """LedgerError unless vLLM's executor is made as `vllm_idlm.ray_executor` knows it."""
    if executor.__name__ not in ("RayExecutorV2", "RayDistributedExecutor"):
        raise refuse(executor.__name__, "a Ray executor that the plugin does not know")
    expect(executor, "_init_executor", "self")
    if executor.__name__ == "RayExecutorV2":
        expect_source(executor, "_init_executor", "initialize_ray_cluster(self.parallel_config", "RayWorkerProc")
        expect(executor, "_get_actor_resource_kwargs")
