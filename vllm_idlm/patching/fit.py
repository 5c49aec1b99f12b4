"""Whether the patches fit a source tree, and what they rely on that nobody has reviewed at that version."""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vllm_idlm.patching import code
from vllm_idlm.patching.record import Patch, Target
from vllm_idlm.patching.tree import Definition, Tree

REVIEWED = Path(__file__).parent.parent / "ledger" / "reviewed.json"  # version -> path -> fingerprint
FITS, UNREVIEWED, MISFIT = "fits", "fits, unreviewed", "does not fit"


@dataclass(frozen=True)
class State:
    """What became of one patch: `kind` is FITS, UNREVIEWED or MISFIT, `details` say where and why."""

    kind: str
    details: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}: {'; '.join(self.details)}" if self.details else self.kind


def state(patch: Patch, tree: Tree) -> State:
    """Tell what becomes of a patch on that tree."""
    problems = tuple(problem for target in patch.targets if (problem := _problem(target, tree)))
    if problems:
        return State(MISFIT, problems)
    changed = tuple(name for target in patch.targets if (name := _unreviewed(target, tree)))
    return State(UNREVIEWED, tuple(dict.fromkeys(changed))) if changed else State(FITS)


def states(patches: Iterable[Patch], tree: Tree) -> dict[str, State]:
    """Tell the `state` of each, by name."""
    return {patch.name: state(patch, tree) for patch in patches}


def _problem(target: Target, tree: Tree) -> str | None:
    """Why the tree is not what `target` expects, None if it is."""
    if not _applies_to(target, tree):
        return None
    if not target.name:
        return (
            None if tree.module(target.module) or tree.has_folder(target.module) else f"{target.module}: no such module"
        )
    found = tree.find(target.path)
    if found is None:
        return f"{target.path}: not found"
    problem = _signature(target, found, tree)
    problem = problem or next((f"its code does not contain {h!r}" for h in target.holds if h not in found.text), None)
    if not problem and target.fields:
        there = code.attributes(found.node).union(*(code.attributes(p.node) for p in tree.parents(found)))
        lacking = [name for name in target.fields if name not in there]
        problem = f"has no attribute {', '.join(lacking)}" if lacking else None
    return f"{target.path}: {problem}" if problem else None


def _applies_to(target: Target, tree: Tree) -> bool:
    """Whether the tree has the target to be looked at: it is not a method that its class inherits."""
    return not (target.own and not _of_its_own(target, tree))


def _of_its_own(target: Target, tree: Tree) -> bool:
    owner, _, name = target.path.rpartition(".")
    found = tree.find(owner)
    return found is None or any(getattr(part, "name", None) == name for part in getattr(found.node, "body", []))


def _signature(target: Target, found: Definition, tree: Tree) -> str | None:
    """Why the function (a class: its constructor) cannot be called or wrapped as the patch does, None if it can."""
    made = isinstance(found.node, ast.ClassDef)
    function = tree.find(f"{target.path}.__init__") if made else found
    if function is None or not isinstance(function.node, code.Function):
        return None
    theirs = code.parameters(function.node)[1 if made else 0 :]
    if target.takes and (problem := code.missing(target.takes, theirs)):
        return problem
    return code.unfit(code.of_wrapper(target.wrapper), theirs) if target.wrapper is not None else None


def _unreviewed(target: Target, tree: Tree) -> str | None:
    """The target's path if it is a function whose code no reviewed version has."""
    mark = _mark(target, tree)
    known = {paths.get(target.path) for paths in reviewed().values()}
    return target.path if mark is not None and mark not in known else None


def _mark(target: Target, tree: Tree) -> str | None:
    """The fingerprint of a target whose whole code matters: of a function, or of a class that is replaced."""
    if not target.name or not _applies_to(target, tree):
        return None
    found = tree.find(target.path)
    whole = found is not None and isinstance(found.node, code.Function | ast.ClassDef)
    if not whole or (isinstance(found.node, ast.ClassDef) and target.wrapper is None):
        return None
    return code.fingerprint(found.node)


def marks(patches: Iterable[Patch], tree: Tree) -> dict[str, str]:
    """Return the fingerprints of all that the patches rely on, by path: what a review of that tree enters."""
    found = {target.path: _mark(target, tree) for patch in patches for target in patch.targets}
    return {path: mark for path, mark in sorted(found.items()) if mark is not None}


@functools.cache
def reviewed() -> dict[str, dict[str, str]]:
    """Return the fingerprints of the reviewed code, by vLLM version and path."""
    return json.loads(REVIEWED.read_text(encoding="utf-8")) if REVIEWED.is_file() else {}
