"""vLLM changed under the plugin: nothing of it breaks vLLM, plain engines run as ever, ISD is refused or not needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import stand_in
from tests.engines import in_a_process
from tests.tiny import write_tiny
from vllm_idlm.patching import Tree, entries, fit

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What became of the patches for every class renamed and every function with a new parameter."""
    command = [sys.executable, "-m", "tests.stand_in", str(tmp_path_factory.mktemp("vllm"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1].removeprefix("FOUND "))


def _of(path: str) -> set[str]:
    return {one.name for one in entries() if any(t.path == path and t.wrapper is not None for t in one.targets)}


def test_every_patch_is_applied_to_the_stand_in(outcomes):
    assert [o["misfits"] for o in outcomes if o["change"] == "nothing"] == [{}]


def test_plain_engines_get_vllms_own_result_from_objects_that_have_nothing(outcomes):
    """Whatever attributes vLLM renames: no wrapper touches an object before it knows of ISD."""
    assert [o["wrong"] for o in outcomes if o["change"] == "nothing"] == [{}]


def test_what_is_renamed_leaves_its_own_patches_out_and_breaks_no_import(outcomes):
    """One patch of a module that does not fit leaves the others of the module in place."""
    renamed = [o for o in outcomes if o["change"] == "renamed"]
    assert len(renamed) >= 40
    for outcome in renamed:
        inherited = any(t.path == outcome["path"] and t.own for one in entries() for t in one.targets)
        assert set(outcome["misfits"]) == (set() if inherited else _of(outcome["path"])), outcome
        assert all("not found" in why for why in outcome["misfits"].values())


def test_a_renamed_class_leaves_all_its_patches_out(outcomes):
    for outcome in (o for o in outcomes if o["change"] == "class renamed"):
        owner = outcome["path"].rpartition(".")[0]
        theirs = {one.name for one in entries() for t in one.targets if t.wrapper and t.path.startswith(f"{owner}.")}
        assert set(outcome["misfits"]) == theirs, outcome


def test_a_new_parameter_goes_through_or_leaves_the_patch_out(outcomes):
    """A wrapper that would drop it is never put in place: every engine's first request would end in a TypeError."""
    through = refused = 0
    for outcome in (o for o in outcomes if o["change"] == "parameter"):
        assert set(outcome["misfits"]) <= _of(outcome["path"]), outcome
        through, refused = through + (not outcome["misfits"]), refused + bool(outcome["misfits"])
    assert min(through, refused) >= 10


class Changed(Tree):
    """A source tree with the text of one module replaced."""

    def __init__(self, tree: Tree, module: str, text: str) -> None:
        self.place, self._modules = tree.place, {k: v for k, v in tree._modules.items() if k != module}
        self._imported, self._wheel, self._names = {}, None, frozenset()
        self._changed = {f"{module.replace('.', '/')}{end}": text for end in (".py", "/__init__.py")}

    def _read(self, path: str) -> str | None:
        text = super()._read(path)
        return text if text is None else self._changed.get(path, text)


def test_the_source_says_the_same_without_an_import():
    """Each function that is wrapped, renamed where it is written: the static check names the patch, in two or three
    cases as unreviewed, where a parent class has such a method too."""
    tree, kinds = Tree.installed(), []
    for target in stand_in.wrapped():
        found, name = tree.find(target.path), target.name.rpartition(".")[2]
        text = found.module.text.replace(f"def {name}(", f"def {name}_anew(")
        text = text.replace(f"class {name}", f"class {name}Anew")
        changed = Changed(tree, found.module.name, text)
        states = {one.name: fit.state(one, changed) for one in entries() if one.name in _of(target.path)}
        kinds += [state.kind for state in states.values() if not target.own]
    assert fit.FITS not in kinds
    assert kinds.count(fit.MISFIT) >= 40


# -- the real vLLM with one thing changed


_SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

def answers(**options):
    llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, kv_cache_memory_bytes=50_000_000, max_model_len=64,
              max_num_seqs=2, disable_log_stats=True, skip_tokenizer_init=True, **options)
    sampling = SamplingParams(temperature=0, max_tokens=8, detokenize=False, ignore_eos=True)
    return list(llm.generate([{"prompt_token_ids": [5, 6, 7]}], sampling, use_tqdm=False)[0].outputs[0].token_ids)

found = {"plain": answers()}
try:
    found["isd"] = answers(speculative_config={"method": "isd", "n": 3, "mask_token_id": 1, "coverage": "last"})
except Exception as error:
    found["error"] = f"{type(error).__name__}: {error}"
print("FOUND " + json.dumps(found))
"""


@pytest.fixture
def changed_vllm(tmp_path):
    """A function that lays vLLM out anew by links, with one file changed; returns the environment to run it in."""

    def lay(file: str, old: str, new: str) -> dict[str, str]:
        real, place = Tree.installed().place, tmp_path / "site"
        _link(real / "vllm", place / "vllm", Path(file).parts)
        text = (real / "vllm" / file).read_text()
        assert old in text
        (place / "vllm" / file).write_text(text.replace(old, new))
        for entry in real.glob("vllm*.dist-info"):
            (place / entry.name).symlink_to(entry)
        path = os.pathsep.join(filter(None, [str(place), str(ROOT), os.environ.get("PYTHONPATH")]))
        return {**os.environ, "PYTHONPATH": path}

    return lay


def _link(source: Path, place: Path, parts: tuple[str, ...]) -> None:
    """Link all of `source` into `place` but the file at `parts`, whose folders are made."""
    place.mkdir(parents=True)
    for entry in source.iterdir():
        if entry.name == "__pycache__":
            continue
        if entry.name != parts[0]:
            (place / entry.name).symlink_to(entry)
        elif len(parts) > 1:
            _link(entry, place / entry.name, parts[1:])


@pytest.mark.vllm
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("file", "old", "new", "refused"),
    [
        ("v1/core/sched/scheduler.py", "make_spec_decoding_stats", "spec_decoding_anew", "masks-are-no-drafts"),
        ("v1/executor/ray_executor_v2.py", "RayExecutorV2", "RayExecutorV3", None),
    ],
    ids=["a method that every ISD engine needs", "a class that nobody asked for"],
)
def test_a_real_engine_of_a_changed_vllm(changed_vllm, tmp_path, file, old, new, refused):
    """Plain decoding runs with the plugin installed; ISD says what does not fit, or runs if it does not need it."""
    model = write_tiny(tmp_path / "model")
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    found = in_a_process([sys.executable, str(script), str(model)], changed_vllm(file, old, new))
    assert len(found["plain"]) == 8
    if refused is None:
        assert found["isd"] == found["plain"]
    else:
        assert f"Patch {refused}" in found["error"]
        assert "make_spec_decoding_stats: not found" in found["error"]
        assert "VLLM_PLUGINS=''" in found["error"]
