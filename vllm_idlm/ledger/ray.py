"""Ledger: engines whose workers are Ray actors. What they run instead stands in `vllm_idlm.ray_executor`."""

from __future__ import annotations

from vllm_idlm.patching import patch, require, runs_isd

_V2 = "vllm.v1.executor.ray_executor_v2"

ray_executor = patch(
    "ray-executor",
    "vllm.v1.executor.abstract",
    "ray",
    what="Executor.get_class gives a subclass of vLLM's Ray executor to an engine with ISD: it checks that every node "
    "has the same plugin, and on the CPU platform it counts Ray's CPUs as devices (there it sets the platform's "
    "ray_device_key and the module's RayWorkerProc while the executor is built)",
    why="a node without the plugin, or with another version, would end in an ImportError in an actor or, worse, in "
    "ranks that disagree; vLLM's CPU platform names no Ray resource and refuses Ray",
    removed_by="plugins that vLLM compares across ranks, and a ray_device_key of the CPU platform (vllm#21602, closed)",
)
ray_executor.reads(
    f"{_V2}:RayExecutorV2._init_executor", "self",
    holds=("initialize_ray_cluster(self.parallel_config", "RayWorkerProc"),
)  # fmt: skip
ray_executor.reads(f"{_V2}:RayExecutorV2._get_actor_resource_kwargs")
ray_executor.reads(f"{_V2}:RayWorkerProc.get_node_and_physical_gpu_ids", "self")
ray_executor.reads(
    f"{_V2}:RayWorkerProc.initialize_worker",
    "self", "local_rank", "env_vars", "distributed_init_method", "driver_env_vars", "assigned_physical_gpu_ids",
)  # fmt: skip
ray_executor.reads(f"{_V2}:RayWorkerProc", fields=("_init_kwargs",))
ray_executor.reads("vllm.v1.executor.ray_utils:initialize_ray_cluster", "parallel_config")
ray_executor.reads("vllm.platforms.interface:Platform", fields=("ray_device_key",))


@ray_executor.wraps("Executor.get_class", holds=("RayExecutorV2",))
def get_class(original, vllm_config):
    """Give an engine with ISD our executor; Ray itself is imported only where an engine asks for it."""
    chosen = original(vllm_config)
    if not runs_isd(vllm_config) or not chosen.uses_ray:
        return chosen
    require({"ray"})
    if chosen.__name__ != "RayExecutorV2":
        raise _another_executor(chosen.__name__)
    from vllm_idlm.ray_executor import ISDRayExecutor

    return ISDRayExecutor


def _another_executor(name: str) -> Exception:
    """SettingsError for a Ray executor other than RayExecutorV2, such as the older one that vLLM 0.33 removed."""
    from vllm_idlm.settings import SettingsError

    older = name == "RayDistributedExecutor"
    fix = "Unset VLLM_USE_RAY_V2_EXECUTOR_BACKEND (0 chooses vLLM's older Ray executor, which vLLM 0.33 removed)"
    return SettingsError(
        f"method isd runs on vLLM's RayExecutorV2, and this engine would run on {name}. "
        + (fix if older else 'Give "ray" as distributed_executor_backend')
    )
