"""Workers on Ray on a CPU: a rank is not handed on as a device."""

from __future__ import annotations

import pytest


def test_a_worker_on_a_cpu_does_not_hand_its_rank_on_as_a_device(monkeypatch):
    """vLLM 0.33 takes such ids for nodes of memory, and ends in an IndexError for a rank that is none."""
    pytest.importorskip("ray")
    from vllm.v1.executor.ray_executor_v2 import RayWorkerProc

    from vllm_idlm.ray_executor import CPURayWorkerProc

    given = {}
    monkeypatch.setattr(RayWorkerProc, "initialize_worker", lambda self, *args, **kwargs: given.update(kwargs))
    worker = CPURayWorkerProc.__new__(CPURayWorkerProc)
    worker.initialize_worker(1, {}, "tcp://x", assigned_physical_gpu_ids=[2, 3], driver_env_vars={"a": "b"})
    assert given == {"driver_env_vars": {"a": "b"}}
