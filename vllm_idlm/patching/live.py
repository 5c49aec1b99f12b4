"""Applying the patches in this process, each when its module is imported, and refusing an engine that needs a misfit.

An engine without ISD runs as without the plugin whatever vLLM changed: a patch that does not fit is left out, and no
exception of a patch reaches the import of a module of vLLM's. An engine with ISD is refused, with the version and the
fix, if a patch that it needs does not fit. Code that changed since its review and still fits is named in a warning.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from vllm_idlm.patching import code, fit
from vllm_idlm.patching.record import SUPPORTED, LedgerError, Patch, Target, entries, entry
from vllm_idlm.patching.tree import Tree, vllm_version

log = logging.getLogger("vllm.idlm")  # below vLLM's logger, so that it is printed as vLLM's lines are
_MARK = "__vllm_idlm_patched__"
_MISFITS: dict[str, str] = {}  # patches that do not fit, as far as this process knows, and why; they do nothing
_ORIGINALS: dict[str, Callable] = {}  # what was wrapped in this process, by path
_TOLD: set[str] = set()  # what was warned of in this process


# -- applying


def install() -> None:
    """Apply every patch: now if its module is loaded, else at the module's import. Calling it again changes nothing."""
    if not installed():
        sys.meta_path.insert(0, _PatchOnImport())
    for name in {one.module for one in entries()}:
        if name in sys.modules:
            _apply_all(sys.modules[name])


def installed() -> bool:
    """Whether `install` was called in this process."""
    return any(isinstance(finder, _PatchOnImport) for finder in sys.meta_path)


class _PatchOnImport(importlib.abc.MetaPathFinder):
    """Lets the ordinary finders find a module of the ledger, and patches it right after it was executed."""

    def find_spec(self, fullname, path, target=None):
        if not any(one.module == fullname for one in entries()):
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                _wrap_loader(spec.loader)
                return spec
        return None


def _wrap_loader(loader: Any) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        _apply_all(module)

    loader.exec_module = exec_module


def _apply_all(module: ModuleType) -> None:
    """Apply the module's patches, each whole or not at all. Nothing that goes wrong in one leaves this function."""
    done = module.__dict__.setdefault(_MARK, set())
    for one in entries():
        if one.module == module.__name__ and one.name not in done:
            try:
                _apply(one, module)
                done.add(one.name)
            except Exception as error:
                _MISFITS[one.name] = (
                    str(error) if isinstance(error, LedgerError) else f"{type(error).__name__}: {error}"
                )


def _apply(patch: Patch, module: ModuleType) -> None:
    ready = [_replacement(patch, target, module) for target in patch.targets if target.wrapper is not None]
    for owner, name, value in filter(None, ready):
        setattr(owner, name, value)
    for action in patch.actions:
        action(module)


def _replacement(patch: Patch, target: Target, module: ModuleType) -> tuple[Any, str, Any] | None:
    """What is to be set where for a target that is wrapped; None for a method that its class inherits.

    Raises LedgerError where it is not there, or takes what the wrapper does not.
    """
    *outer, name = target.name.split(".")
    owner = functools.reduce(_attribute, outer, module)
    if target.own and name not in vars(owner):
        return None
    static = inspect.getattr_static(owner, name, None)
    if static is None:
        raise LedgerError(f"{target.path}: not found")
    original = static.__func__ if isinstance(static, classmethod | staticmethod) else static
    problem = code.unfit(code.of_wrapper(target.wrapper), list(inspect.signature(original).parameters.values()))
    if problem:
        raise LedgerError(f"{target.path}: {problem}")
    _ORIGINALS[target.path] = original
    around = _around(original, target.wrapper, patch.name)
    return owner, name, type(static)(around) if original is not static else around


def _attribute(owner: Any, name: str) -> Any:
    if not hasattr(owner, name):
        raise LedgerError(f"{getattr(owner, '__name__', owner)}.{name}: not found")
    return getattr(owner, name)


def _around(original: Callable, wrapper: Callable, name: str) -> Callable:
    """A function that calls `wrapper` with `original` first, and passes for `original` in all else.

    It is `original` once patch `name` is known not to fit.
    """

    @functools.wraps(original, updated=() if isinstance(original, type) else ("__dict__",))
    def around(*args, **kwargs):
        return original(*args, **kwargs) if name in _MISFITS else wrapper(original, *args, **kwargs)

    return around


def original(path: str) -> Callable:
    """Return what stood at `path` ("module:Class.method") before a patch wrapped it in this process."""
    return _ORIGINALS[path]


def replace(name: str, owner: Any, attribute: str, new: Callable) -> None:
    """Let `new` take the place of a callable attribute of one of vLLM's objects; patch `name` lists it.

    Raises LedgerError where the patch does not list such an attribute, or `new` does not take what that one takes.
    """
    patch = entry(name)
    if not any(target.name.rpartition(".")[2] == attribute or attribute in target.fields for target in patch.targets):
        raise LedgerError(f"patch {name} does not list the attribute {attribute!r} of {type(owner).__name__}")
    present = getattr(owner, attribute, None)
    if present is None:
        raise _refusal(patch, f"{type(owner).__name__}.{attribute}: not found")
    if problem := code.unfit(_parameters(new), _parameters(present)):
        raise _refusal(patch, f"{type(owner).__name__}.{attribute}: {problem}")
    setattr(owner, attribute, new)


def _parameters(called: Callable) -> list[inspect.Parameter]:
    """What a callable takes; of a torch module, whose `__call__` takes anything, what its `forward` does."""
    forward = None if isinstance(called, type) or inspect.isroutine(called) else getattr(called, "forward", None)
    return list(inspect.signature(forward or called).parameters.values())


# -- refusing


def runs_isd(vllm_config: object) -> bool:
    """`settings.runs_isd`, for patches: they must not import the settings (pydantic) before they run."""
    from vllm_idlm import settings

    return settings.runs_isd(vllm_config)


def of_isd(owner: object) -> bool:
    """Whether an object of vLLM's belongs to an engine that runs ISD; it need not have a configuration at all."""
    return runs_isd(getattr(owner, "vllm_config", None))


def misfit(*features: str) -> str | None:
    """Say why an engine or request with these features (and "isd") cannot be had; None if it can."""
    check()
    having = frozenset({"isd", *features})
    refused = next((one for one in entries() if one.name in _MISFITS and one.needed(having)), None)
    return str(_refusal(refused, _MISFITS[refused.name])) if refused else None


def left_out(name: str) -> bool:
    """Tell whether the patch does not fit, so that the code it serves must do without it."""
    check()
    return name in _MISFITS


def require(features: Iterable[str]) -> None:
    """Raise LedgerError unless every patch fits that an engine with these features (and "isd") needs.

    Each process of the engine asks for itself: from then on a patch that does not fit does nothing in it. Warns of code
    that nobody has reviewed at this version, and of missing patches that only cost time; of each once.
    """
    having = frozenset({"isd", *features})
    if problem := misfit(*having):
        raise LedgerError(problem)
    states = check()
    having |= {"grammar"}  # any request may come with one
    _warn([(one, states[one.name]) for one in entries() if one.needs <= having])


def check(imports: bool = False) -> dict[str, fit.State]:
    """Tell what becomes of each patch on the installed vLLM, by its source and by what was applied in this process.

    imports: import every module that is patched first, so that every patch is applied (or is seen not to be).
    """
    if imports:
        for one in entries():
            _import(one)
    found = dict(_states())
    for name, state in found.items():
        if state.kind == fit.MISFIT:
            _MISFITS.setdefault(name, "; ".join(state.details))
    return found | {name: fit.State(fit.MISFIT, (why,)) for name, why in _MISFITS.items() if name in found}


def _import(patch: Patch) -> None:
    """Import the patch's module; what that raises, or a patch that was not applied by it, is a misfit."""
    try:
        module = importlib.import_module(patch.module)
    except Exception as error:
        _MISFITS.setdefault(patch.name, f"{patch.module}: {type(error).__name__}: {error}")
    else:
        changes = patch.actions or any(target.wrapper is not None for target in patch.targets)
        if changes and patch.name not in getattr(module, _MARK, ()):
            _MISFITS.setdefault(patch.name, f"{patch.module}: imported, and not patched")


@functools.cache
def _states() -> tuple[tuple[str, fit.State], ...]:
    """The patches' states by the installed vLLM's source, which is read once a process and not kept."""
    tree = Tree.installed()
    if tree is None:
        raise LedgerError(
            f"the source files of vLLM {vllm_version()} are not found: vllm-idlm checks its patches on them. Fix: "
            "install vLLM as an ordinary wheel, or set VLLM_PLUGINS='' to start vLLM without this plugin"
        )
    return tuple((one.name, fit.state(one, tree)) for one in entries())


def _warn(patches: list[tuple[Patch, fit.State]]) -> None:
    """Say what of the patches' states was not said before in this process."""
    changed = {path for _, state in patches if state.kind == fit.UNREVIEWED for path in state.details} - _TOLD
    if changed:
        log.warning(
            "ISD: vLLM %s has changed code that vllm-idlm relies on and nobody has reviewed: %s. It still fits, and is "
            "used; `idlm doctor --engine` compares the engine with plain decoding",
            vllm_version(), ", ".join(sorted(changed)),
        )  # fmt: skip
    for patch, state in patches:
        if state.kind == fit.MISFIT and patch.name not in _TOLD:
            log.warning("ISD: patch %s does not fit vLLM %s and does nothing (%s): %s", patch.name, vllm_version(),
                        patch.what, "; ".join(state.details))  # fmt: skip
    _TOLD.update(changed, (patch.name for patch, state in patches if state.kind == fit.MISFIT))


def _refusal(patch: Patch, problem: str) -> LedgerError:
    """The error for a patch that does not fit: what was found, who needs it, and the fix."""
    version = vllm_version()
    fixes = [patch.way_out(), "" if _supported(version) else f"install a vLLM {SUPPORTED}", "install a newer vllm-idlm"]
    known = "which should fit: please report this" if _supported(version) else f"supported is {SUPPORTED}"
    return LedgerError(
        f"vllm-idlm does not fit this vLLM ({version}; {known}). Patch {patch.name}, for {patch.words()}: {problem}. "
        f"Fix: {', or '.join(fix for fix in fixes if fix)}, or set VLLM_PLUGINS='' to start vLLM without this plugin. "
        "`python -m vllm_idlm.ledger` shows every patch."
    )


def _supported(version: str) -> bool:
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        return Version(version.partition("+")[0]) in SpecifierSet(SUPPORTED)
    except InvalidVersion:
        return False
