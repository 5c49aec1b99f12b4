"""Whether patches fit a source: code that they do not know, code that nobody reviewed, renamed code."""

from __future__ import annotations

import pytest

from tests.support import stand_in
from tests.support.sources import RUNNER, patch
from tests.support.stand_in import patches_of
from vllm_idlm.patching import Tree, entries, fit
from vllm_idlm.patching.record import Target


def _state(tree: Tree, target: Target) -> fit.State:
    return fit.state(patch(targets=[target]), tree)


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
    state = _state(tree(runner=RUNNER), target)
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
    found = tree(runner=RUNNER)
    monkeypatch.setattr(Tree, "version", "0.33.0")
    monkeypatch.setattr(fit, "reviewed", dict)
    state = _state(found, target)
    marks = fit.marks([patch(targets=[target])], found)
    assert state == (fit.State(fit.UNREVIEWED, (target.path,)) if marks else fit.State(fit.FITS))
    monkeypatch.setattr(fit, "reviewed", lambda: {"0.33.0": marks})
    assert _state(found, target) == fit.State(fit.FITS)


class Changed(Tree):
    """A source tree with the text of one module replaced."""

    def __init__(self, tree: Tree, module: str, text: str) -> None:
        self.place, self._modules = tree.place, {k: v for k, v in tree._modules.items() if k != module}
        self._imported, self._wheel, self._names = {}, None, frozenset()
        self._changed = {f"{module.replace('.', '/')}{end}": text for end in (".py", "/__init__.py")}

    def _read(self, path: str) -> str | None:
        text = super()._read(path)
        return text if text is None else self._changed.get(path, text)


@pytest.mark.heavy
def test_the_source_says_the_same_without_an_import():
    """Each function that is wrapped, renamed where it is written: the static check names the patch, in two or three
    cases as unreviewed, where a parent class has such a method too."""
    tree, kinds = Tree.installed(), []
    for target in stand_in.wrapped():
        found, name = tree.find(target.path), target.name.rpartition(".")[2]
        text = found.module.text.replace(f"def {name}(", f"def {name}_anew(")
        text = text.replace(f"class {name}", f"class {name}Anew")
        changed = Changed(tree, found.module.name, text)
        states = {one.name: fit.state(one, changed) for one in entries() if one.name in patches_of(target.path)}
        kinds += [state.kind for state in states.values() if not target.own]
    assert fit.FITS not in kinds
    assert kinds.count(fit.MISFIT) >= 40
