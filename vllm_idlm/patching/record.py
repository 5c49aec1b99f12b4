"""A patch of vLLM as data: what it is for, the vLLM code it relies on, and the functions that it wraps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

SUPPORTED = ">=0.32,<0.34"

# What an engine may run: the words for it, and how to run without it. A patch names the features that need it.
FEATURES = {
    "isd": ("every engine with ISD", ""),
    "v1": ("Model Runner V1", "let vLLM choose Model Runner V2 (VLLM_USE_V2_MODEL_RUNNER=1)"),
    "v2": ("Model Runner V2", "set VLLM_USE_V2_MODEL_RUNNER=0"),
    "cpu": ("vLLM's CPU platform", ""),
    "lora": ("a gated adapter", ""),
    "ray": ("workers on Ray", "leave Ray out (--distributed-executor-backend mp)"),
    "groups": ("mask slots behind rejected drafts", 'set "coverage": "last"'),
    "auto": ('"coverage": "auto"', 'set "coverage": "last"'),
    "rows": ('"cpu_linear": "rows"', 'set "cpu_linear": "vllm"'),
    "grammar": ("structured output", "send such requests without structured output"),
    "sdar": ("models of type sdar", ""),
}


class LedgerError(RuntimeError):
    """vLLM's code is not the code that a patch of this plugin was written for."""


@dataclass(frozen=True)
class Target:
    """Something of vLLM's that a patch relies on. Without expectations of its own it must exist."""

    path: str  # "module:function", "module:Class" or "module:Class.method"
    takes: tuple[str, ...] = ()  # parameters that the function has, in this order, among others
    holds: tuple[str, ...] = ()  # text that its source contains
    fields: tuple[str, ...] = ()  # attributes that the class sets on itself
    wrapper: Callable | None = None  # what takes the function's place: called with the function first
    own: bool = False  # a method that the class may have of its own, else it is its parent's and not wrapped

    @property
    def module(self) -> str:
        """The module's name."""
        return self.path.partition(":")[0]

    @property
    def name(self) -> str:
        """The name within the module, with dots; "" for the module itself."""
        return self.path.partition(":")[2]


@dataclass
class Patch:
    """One change to vLLM, or one use of its private state: what, why, for what, until when."""

    name: str
    module: str  # the vLLM module whose import triggers the patch
    needs: frozenset[str]  # features, all of which an engine must run to need the patch
    what: str
    why: str
    removed_by: str  # the upstream change that makes it unnecessary; with its number where there is one
    optional: bool = False  # costs time alone where it is missing: no reason to refuse an engine
    targets: list[Target] = field(default_factory=list)
    actions: list[Callable[[ModuleType], None]] = field(default_factory=list)

    def wraps(self, name: str, *, own: bool = False, holds: Iterable[str] = ()) -> Callable[[Callable], Callable]:
        """Enter the decorated function as a wrapper of `name`; it gets the wrapped function as its first argument.

        name: within the patch's module. The wrapper must take everything that the function takes: that is checked.
        own: leave the method alone where the class inherits it.
        """

        def enter(wrapper: Callable) -> Callable:
            self.targets.append(Target(f"{self.module}:{name}", holds=tuple(holds), wrapper=wrapper, own=own))
            return wrapper

        return enter

    def reads(self, path: str, *takes: str, holds: Iterable[str] = (), fields: Iterable[str] = ()) -> None:
        """Enter something that the patch relies on without replacing it; a `path` without module is the patch's."""
        whole = path if ":" in path else f"{self.module}:{path}"
        self.targets.append(Target(whole, takes, tuple(holds), tuple(fields)))

    def applies(self, action: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        """Enter the decorated function as something to be done with the module once it is imported."""
        self.actions.append(action)
        return action

    def needed(self, features: frozenset[str]) -> bool:
        """Whether an engine with these features does not run rightly without the patch."""
        return not self.optional and self.needs <= features

    def words(self) -> str:
        """What needs the patch, in words."""
        return " with ".join(FEATURES[name][0] for name in sorted(self.needs))

    def way_out(self) -> str:
        """How to run without what needs the patch, "" where there is no way."""
        return " or ".join(FEATURES[name][1] for name in sorted(self.needs) if FEATURES[name][1])


_PATCHES: dict[str, Patch] = {}


def patch(name: str, module: str, *needs: str, what: str, why: str, removed_by: str, optional: bool = False) -> Patch:
    """Enter a patch into the ledger; what it wraps and relies on is entered by its methods.

    needs: names of FEATURES; none: every engine with ISD.
    """
    if name in _PATCHES:
        raise ValueError(f"the ledger has a patch {name!r} already")
    if unknown := set(needs) - set(FEATURES):
        raise ValueError(f"patch {name}: {sorted(unknown)} are no features; there are {', '.join(FEATURES)}")
    made = Patch(name, module, frozenset(needs or ("isd",)), what, why, removed_by, optional)
    _PATCHES[name] = made
    return made


def entries() -> list[Patch]:
    """Return every patch of the ledger, in the order of entry."""
    return list(_PATCHES.values())


def entry(name: str) -> Patch:
    """Return the patch called `name`."""
    return _PATCHES[name]


def targets(patches: Iterable[Patch]) -> dict[str, list[tuple[Patch, Target]]]:
    """Return what the patches rely on, by path: who relies on it, and how."""
    by_path: dict[str, list[tuple[Patch, Any]]] = {}
    for one in patches:
        for target in one.targets:
            by_path.setdefault(target.path, []).append((one, target))
    return by_path
