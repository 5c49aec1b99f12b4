"""The vLLM names that this plugin imports, and the keywords that it calls them with, looked up in a source tree."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

from vllm_idlm.patching import code
from vllm_idlm.patching.tree import Tree

PACKAGE = Path(__file__).parent.parent


def sources(root: Path = PACKAGE) -> list[Path]:
    """The plugin's Python files, those of the folders that are packaged from elsewhere too."""
    beside = [root.parent / name for name in ("proposers", "kernels") if (root.parent / name / "__init__.py").is_file()]
    return sorted(file for folder in (root, *beside) for file in folder.rglob("*.py"))


def problems(tree: Tree, files: list[Path] | None = None) -> list[str]:
    """List what of vLLM the files import or call in a way that the tree does not have, a line each."""
    found: list[str] = []
    for file in sources() if files is None else files:
        module = ast.parse(file.read_text(encoding="utf-8"))
        imported = dict(_imports(module))
        for name, (line, path) in imported.items():
            if not _exists(tree, path):
                found.append(f"{file.name}:{line}: {path} is imported as {name} and does not exist")
        found += [f"{file.name}:{line}: {words}" for line, words in _calls(tree, module, imported)]
    return found


def _imports(module: ast.Module) -> Iterator[tuple[str, tuple[int, str]]]:
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and _is_vllm(node.module or ""):
            for alias in node.names:
                yield alias.asname or alias.name, (node.lineno, f"{node.module}:{alias.name}")


def _is_vllm(module: str) -> bool:
    return module == "vllm" or module.startswith("vllm.")


def _exists(tree: Tree, path: str) -> bool:
    module, _, name = path.partition(":")
    inner = f"{module}.{name}"
    if tree.module(inner) is not None or tree.has_folder(inner) or tree.find(path) is not None:
        return True
    source = tree.module(module)
    # Names that a module gives when asked (`__getattr__`) stand in it as text.
    return source is not None and tree.find(f"{module}:__getattr__") is not None and f'"{name}"' in source.text


def _calls(tree: Tree, module: ast.Module, imported: dict[str, tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Calls of imported names whose keywords the function does not take: line, words."""
    for node in ast.walk(module):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id not in imported:
            continue
        theirs = _parameters(tree, imported[node.func.id][1])
        if theirs is None or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in theirs):
            continue
        unknown = [k.arg for k in node.keywords if k.arg and k.arg not in {p.name for p in theirs}]
        if unknown:
            yield node.lineno, f"{node.func.id}() has no parameter {', '.join(unknown)}"


def _parameters(tree: Tree, path: str) -> list[inspect.Parameter] | None:
    """The parameters of a function or constructor; None where they do not stand in the source (dataclasses)."""
    found = tree.find(path)
    if found is not None and isinstance(found.node, ast.ClassDef):
        found = tree.find(f"{path}.__init__")
    return code.parameters(found.node) if found is not None and isinstance(found.node, code.Function) else None
