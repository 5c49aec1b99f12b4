"""The ledger: every patch fits this vLLM and is reviewed at every version; the command that lists them."""

from __future__ import annotations

from tests.support.processes import python
from tests.support.sources import RUNNER, patch
from vllm_idlm import ledger, plugin  # noqa: F401  the first import enters the patches
from vllm_idlm.patching import Tree, entries, fit, live, record, uses
from vllm_idlm.patching.record import Target


def test_every_patch_fits_is_reviewed_and_tells_its_story():
    plugin.register()
    states = {name: str(state) for name, state in live.check(imports=True).items() if state.kind != fit.FITS}
    assert states == {}
    for entry in entries():
        assert all((entry.what, entry.why, entry.removed_by, entry.needs, entry.targets))


def test_every_target_is_reviewed_at_every_version():
    """An entry of another path, or one that has gone, shows in the list of fingerprints."""
    paths = set(record.targets(entries()))
    for reviewed in fit.reviewed().values():
        assert set(reviewed) <= paths
        assert set(reviewed) == set(fit.marks(entries(), Tree.installed()))


# -- the command


def test_a_source_is_checked_without_importing_vllm():
    place = Tree.installed().place
    code = (
        "import sys; from vllm_idlm.ledger.__main__ import main;"
        f"status = main(['--source', {str(place)!r}]);"
        "print(status, sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    assert python(code) == "0 []"


def test_two_sources_are_compared(tree, tmp_path, capsys, monkeypatch):
    from vllm_idlm.ledger import __main__ as command

    (tmp_path / "old").mkdir()
    old = tree(runner=RUNNER)
    (tmp_path / "vllm").rename(tmp_path / "old" / "vllm")
    old, new = Tree(tmp_path / "old"), tree(runner=RUNNER.replace("return self.sampler(output)", "return None"))
    monkeypatch.setattr(command, "entries", lambda: [patch(targets=[Target("vllm.runner:Runner.step")])])
    assert command.differences(old, new) == 0
    printed = capsys.readouterr().out
    assert "-    return self.sampler(output)\n+    return None\n" in printed
    assert "1 of 1 functions changed, 2 lines" in printed


def test_unreviewed_code_is_an_error_where_it_is_asked_for(tree, capsys, monkeypatch):
    from vllm_idlm.ledger import __main__ as command

    found = tree(runner=RUNNER)
    monkeypatch.setattr(command, "entries", lambda: [patch(targets=[Target("vllm.runner:Runner.step")])])
    monkeypatch.setattr(uses, "problems", lambda tree: [])
    assert command.source(found, brief=True, strict=False, reviewed=False) == 0
    assert command.source(found, brief=True, strict=True, reviewed=False) == 1
    assert "1 of them on code that nobody has reviewed" in capsys.readouterr().out.replace("\n", " ")
