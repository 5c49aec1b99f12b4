"""The ledger: every patch fits this vLLM, is entered once, refuses what it does not know; the plugin stays cheap."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

from vllm_idlm import ledger, plugin
from vllm_idlm.ledger import core


def _python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.strip().splitlines()[-1]


def test_every_patch_fits_and_tells_its_story():
    plugin.register()
    assert set(ledger.check().values()) == {"applied"}
    for entry in ledger.entries():
        assert all((entry.what, entry.why, entry.removed_by, entry.versions))


def test_registering_twice_patches_once():
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    before = EngineArgs.create_speculative_config
    plugin.register()
    assert EngineArgs.create_speculative_config is before


def test_the_plugin_imports_neither_torch_nor_vllm():
    heavy = "sorted({'torch', 'vllm', 'transformers', 'pydantic'} & set(sys.modules))"
    assert _python(f"import sys; from vllm_idlm.plugin import register; register(); print({heavy})") == "[]"


def test_vllm_finds_the_plugin_in_a_fresh_process():
    code = (
        "from vllm.plugins import load_general_plugins; load_general_plugins();"
        "from vllm_idlm.ledger import check; print(set(check().values()))"
    )
    assert _python(code) == "{'applied'}"


def test_the_plugin_loads_in_a_ray_actor():
    """Ray's workers are fresh interpreters: vLLM loads general plugins in each of them, before it builds a worker."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)

    @ray.remote(num_cpus=0)
    def states():
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        from vllm_idlm.ledger import check

        return set(check().values())

    try:
        assert ray.get(states.remote(), timeout=300) == {"applied"}
    finally:
        ray.shutdown()


def _module(**members) -> types.ModuleType:
    module = types.ModuleType("some.vllm.module")
    module.__dict__.update(members)
    return module


def test_code_that_a_patch_does_not_know_is_refused_with_version_and_fix():
    class Runner:
        def step(self, batch):
            return batch

    with pytest.raises(core.LedgerError) as error:
        core.expect(Runner, "step", "self", "scheduler_output")
    message = str(error.value)
    assert core.vllm_version() in message
    assert core.SUPPORTED in message
    assert "VLLM_PLUGINS" in message
    with pytest.raises(core.LedgerError, match="not found"):
        core.expect(Runner, "execute")
    with pytest.raises(core.LedgerError, match="does not contain"):
        core.expect_source(Runner, "step", "self.rejection_sampler")


def test_a_misfit_stops_isd_and_nothing_else(monkeypatch):
    """With a patch that does not fit, importing vLLM goes on; asking for ISD raises the patch's own error."""

    def apply(module):
        raise core.refuse("some.place", "changed")

    misfit = core.Patch("misfit", "vllm.sampling_params", "what", "why", "never", apply)
    monkeypatch.setattr(core, "_PATCHES", {"misfit": misfit})
    monkeypatch.setattr(core, "_MISFITS", {})
    ledger.install()
    assert "some.place" in ledger.check()["misfit"]
    with pytest.raises(core.LedgerError, match=r"some\.place"):
        ledger.require()
