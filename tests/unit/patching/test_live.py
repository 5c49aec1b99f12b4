"""Patches in a process: a changed vLLM is left as it is, and an engine that needs a misfit is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from tests.support.stand_in import patches_of
from vllm_idlm import ledger, patching  # noqa: F401  the first import enters the patches
from vllm_idlm.patching import entries, fit, live, record

# -- a stand-in vLLM, changed


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What became of the patches for every class renamed and every function with a new parameter."""
    command = [sys.executable, "-m", "tests.support.stand_in", str(tmp_path_factory.mktemp("vllm"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1].removeprefix("FOUND "))


@pytest.mark.heavy
def test_every_patch_is_applied_to_the_stand_in(outcomes):
    assert [o["misfits"] for o in outcomes if o["change"] == "nothing"] == [{}]


@pytest.mark.heavy
def test_plain_engines_get_vllms_own_result_from_objects_that_have_nothing(outcomes):
    """Whatever attributes vLLM renames: no wrapper touches an object before it knows of ISD."""
    assert [o["wrong"] for o in outcomes if o["change"] == "nothing"] == [{}]


@pytest.mark.heavy
def test_what_is_renamed_leaves_its_own_patches_out_and_breaks_no_import(outcomes):
    """One patch of a module that does not fit leaves the others of the module in place."""
    renamed = [o for o in outcomes if o["change"] == "renamed"]
    assert len(renamed) >= 40
    for outcome in renamed:
        inherited = any(t.path == outcome["path"] and t.own for one in entries() for t in one.targets)
        assert set(outcome["misfits"]) == (set() if inherited else patches_of(outcome["path"])), outcome
        assert all("not found" in why for why in outcome["misfits"].values())


@pytest.mark.heavy
def test_a_renamed_class_leaves_all_its_patches_out(outcomes):
    for outcome in (o for o in outcomes if o["change"] == "class renamed"):
        owner = outcome["path"].rpartition(".")[0]
        theirs = {one.name for one in entries() for t in one.targets if t.wrapper and t.path.startswith(f"{owner}.")}
        assert set(outcome["misfits"]) == theirs, outcome


@pytest.mark.heavy
def test_a_new_parameter_goes_through_or_leaves_the_patch_out(outcomes):
    """A wrapper that would drop it is never put in place: every engine's first request would end in a TypeError."""
    through = refused = 0
    for outcome in (o for o in outcomes if o["change"] == "parameter"):
        assert set(outcome["misfits"]) <= patches_of(outcome["path"]), outcome
        through, refused = through + (not outcome["misfits"]), refused + bool(outcome["misfits"])
    assert min(through, refused) >= 10


# -- refusing


def test_a_replaced_attribute_must_be_listed_and_take_what_the_old_one_does():
    class Impl:
        def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, scale=None):
            return output

    impl = Impl()
    with pytest.raises(patching.LedgerError, match="does not list the attribute 'backward'"):
        patching.replace("object-attention", impl, "backward", print)
    with pytest.raises(patching.LedgerError, match=r"Impl\.forward: parameter 'scale' is new to us"):
        patching.replace(
            "object-attention", impl, "forward", lambda layer, query, key, value, kv_cache, attn_metadata, output: 1
        )
    patching.replace("object-attention", impl, "forward", lambda layer, *args, **kwargs: 2)
    assert impl.forward(1, 2) == 2


def test_a_refusal_says_the_version_what_needs_the_patch_and_a_fix_that_helps(monkeypatch):
    """On a version in the range nobody is told to install a version in the range."""
    monkeypatch.setattr(live, "_MISFITS", {"ray-executor": "some.place: changed"})
    monkeypatch.setattr(live, "vllm_version", lambda: "0.33.0")
    with pytest.raises(patching.LedgerError) as error:
        patching.require({"ray", "v1"})
    message = str(error.value)
    for words in (
        "0.33.0",
        "workers on Ray",
        "some.place: changed",
        "--distributed-executor-backend mp",
        "VLLM_PLUGINS",
    ):
        assert words in message
    assert "install a vLLM" not in message
    monkeypatch.setattr(live, "vllm_version", lambda: "0.35.0")
    with pytest.raises(patching.LedgerError, match=r"install a vLLM >=0.32,<0.34"):
        patching.require({"ray", "v1"})
    patching.require({"v1", "v2", "lora", "cpu"})  # nobody asked for Ray


def test_a_patch_that_only_costs_time_refuses_nobody(monkeypatch):
    optional = [entry.name for entry in entries() if entry.optional]
    assert optional
    monkeypatch.setattr(live, "_MISFITS", dict.fromkeys(optional, "changed"))
    patching.require(record.FEATURES)


@pytest.fixture
def told_nothing(monkeypatch):
    """States worked out anew, and nothing warned of yet."""
    monkeypatch.setattr(live, "_TOLD", set())
    monkeypatch.setattr(live, "_MISFITS", {})
    forget = live._states.cache_clear
    forget()
    yield
    forget()


def test_changed_code_is_named_once_whatever_is_required(caplog, monkeypatch, told_nothing):
    paths = {f"vllm.v1.core.sched.scheduler:Scheduler.{name}" for name in ("schedule", "update_from_output")}
    known = {v: {k: mark for k, mark in marks.items() if k not in paths} for v, marks in fit.reviewed().items()}
    monkeypatch.setattr(fit, "reviewed", lambda: known)
    with caplog.at_level("WARNING", logger="vllm.idlm"):
        for features in ((), {"v1"}, {"v2", "auto"}, {"v1", "cpu"}):
            patching.require(features)
    (line,) = [r.getMessage() for r in caplog.records if "nobody has reviewed" in r.getMessage()]
    assert all(path in line for path in paths)
    assert patching.vllm_version() in line


_FEATURES = {"v1", "v2", "cpu", "lora", "ray", "groups", "auto", "rows", "grammar", "sdar"}


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.name)
def test_a_patch_that_does_not_fit_the_source_is_refused_where_all_that_need_it_meet(
    entry, monkeypatch, caplog, told_nothing
):
    """Each patch in turn, by the source alone: it was applied, and from then on does nothing."""
    misfit = fit.State(fit.MISFIT, ("some.place: changed",))
    states = tuple((one.name, misfit if one is entry else fit.State(fit.FITS)) for one in entries())
    monkeypatch.setattr(live, "_states", lambda: states)
    if entry.optional:
        with caplog.at_level("WARNING", logger="vllm.idlm"):
            patching.require(_FEATURES)
        assert f"patch {entry.name} does not fit" in caplog.text
    else:
        with pytest.raises(patching.LedgerError, match=f"Patch {entry.name}, for .*some.place: changed"):
            patching.require(entry.needs)
        assert patching.misfit(*entry.needs)
    for feature in entry.needs - {"isd"}:
        patching.require(_FEATURES - {feature})
    assert patching.left_out(entry.name)
    for target in (t for t in entry.targets if t.wrapper is not None):
        around = live._around(lambda *args, **kwargs: "vLLM's own", target.wrapper, entry.name)
        assert around(1, 2, three=3) == "vLLM's own"
