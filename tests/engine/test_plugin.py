"""The plugin in processes that Ray starts."""

from __future__ import annotations

import pytest


@pytest.mark.vllm
def test_the_plugin_loads_in_a_ray_actor():
    """Ray's workers are fresh interpreters: vLLM loads general plugins in each of them, before it builds a worker."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)

    @ray.remote(num_cpus=0)
    def states():
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        from vllm_idlm.patching import live

        return {state.kind for state in live.check(imports=True).values()}

    try:
        assert ray.get(states.remote(), timeout=300) == {"fits"}
    finally:
        ray.shutdown()
