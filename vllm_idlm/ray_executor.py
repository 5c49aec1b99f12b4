"""vLLM's Ray executor as an engine with ISD runs them: every node has the same plugin, and they run on CPUs too.

The ledger (`ledger.ray`) gives this class to engines with ISD. ISD needs nothing else of Ray: ranks agree
on drafts by themselves (docs/deploy.md). Ray imports this file in its actors before anything of vLLM.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator
from typing import Any

from vllm_idlm.plugin import register

register()  # before vLLM's modules, so that the ledger sees each as it is imported

from vllm.platforms import current_platform  # noqa: E402
from vllm.v1.executor import ray_executor_v2  # noqa: E402
from vllm.v1.executor.ray_utils import initialize_ray_cluster  # noqa: E402

from vllm_idlm.ray_nodes import check_nodes  # noqa: E402
from vllm_idlm.settings import SettingsError  # noqa: E402

CPU_DEVICE = "CPU"  # Ray's own resource stands for a device where vLLM runs on the CPU
# vLLM 0.32 asks for a GPU on the driver's node unless told otherwise, as its own executor tells it; 0.33 never does.
_DRIVER_WITHOUT_GPU = (
    {"require_gpu_on_driver": False}
    if "require_gpu_on_driver" in inspect.signature(initialize_ray_cluster).parameters
    else {}
)


class CPURayWorkerProc(ray_executor_v2.RayWorkerProc):
    """Differs from its parent in that its place on the node stands for the ids that Ray gives to GPUs."""

    def get_node_and_physical_gpu_ids(self) -> tuple[str, list[int]]:
        """This actor's node, and its rank in the place of a device's id: vLLM sorts a node's ranks by it."""
        import ray

        return ray.get_runtime_context().get_node_id(), [self._init_kwargs["rank"]]

    def initialize_worker(self, *args: Any, assigned_physical_gpu_ids: Any = None, **kwargs: Any) -> None:
        """Start the worker without the ids: vLLM 0.33 takes them for nodes of memory on a CPU, and ranks are none."""
        super().initialize_worker(*args, **kwargs)


class ISDRayExecutor(ray_executor_v2.RayExecutorV2):
    """Differs from its parent in that it checks every node before it starts a worker, and in its workers on CPUs."""

    @staticmethod
    def _get_actor_resource_kwargs() -> dict:
        """Nothing on a CPU: what the placement group reserves for the rank is enough."""
        if current_platform.is_cpu():
            return {"num_gpus": 0}
        return ray_executor_v2.RayExecutorV2._get_actor_resource_kwargs()

    def _init_executor(self) -> None:
        if current_platform.is_cpu():
            _refuse_too_few_cpus(self.parallel_config)
        with _cpu_workers() if current_platform.is_cpu() else contextlib.nullcontext():
            initialize_ray_cluster(self.parallel_config, **_DRIVER_WITHOUT_GPU)
            check_nodes(self.parallel_config.placement_group, self.parallel_config.ray_runtime_env)
            super()._init_executor()  # finds the placement group made


def _refuse_too_few_cpus(parallel_config: Any) -> None:
    """SettingsError if Ray has fewer CPUs than ranks. vLLM would wait for them, for half an hour."""
    import ray

    if parallel_config.placement_group or parallel_config.world_size <= 1:
        return
    if not ray.is_initialized():  # as vLLM does on a CPU
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(runtime_env=parallel_config.ray_runtime_env)
    ranks, cpus = parallel_config.world_size, int(ray.cluster_resources().get("CPU", 0))
    if ranks > cpus and ray.util.get_current_placement_group() is None:
        raise SettingsError(
            f"tensor_parallel_size={parallel_config.tensor_parallel_size} on Ray: {ranks} ranks take a CPU each on the "
            f"CPU platform, and Ray has {cpus}. Allowed are at most {cpus} ranks; or start Ray with more "
            f"(`ray start --head --num-cpus {ranks}`), or leave Ray out (--distributed-executor-backend mp)"
        )


@contextlib.contextmanager
def _cpu_workers() -> Iterator[None]:
    """Within it the executor starts CPU workers, and takes Ray's CPUs for devices."""
    key, worker = current_platform.ray_device_key, ray_executor_v2.RayWorkerProc
    current_platform.ray_device_key, ray_executor_v2.RayWorkerProc = CPU_DEVICE, CPURayWorkerProc
    try:
        yield
    finally:
        current_platform.ray_device_key, ray_executor_v2.RayWorkerProc = key, worker
