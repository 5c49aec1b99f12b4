"""A stand-in vLLM that imports in milliseconds: what the ledger wraps, with vLLM's names and parameters and no code.

    python -m tests.support.stand_in FOLDER   # each class renamed, each function with one parameter more, one by one

Printed is a JSON list of what became of the patches in each case. The process has no vLLM but the stand-in.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_idlm import ledger  # noqa: F401  enters the patches
from vllm_idlm.patching import Tree, code, entries, live
from vllm_idlm.patching.record import Target

_IMPORTED = {"contextmanager": "__import__('contextlib').contextmanager"}
# What patches do with a module beside wrapping its functions.
_MORE = {
    "vllm.model_executor.models.registry": "class ModelRegistry:\n    models = {}\n    register_model = print\n",
    "vllm.config.vllm": "from typing import get_args\nEagleModelTypes = None\n",
    "vllm.transformers_utils.config": "_CONFIG_REGISTRY = {}\n",
    "vllm.transformers_utils.configs": "_CLASS_TO_MODULE = {}\n",
}


def wrapped() -> list[Target]:
    """All of vLLM's own that the ledger wraps, each once."""
    tree = Tree.installed()
    targets = {t.path: t for one in entries() for t in one.targets if t.wrapper is not None}
    return [t for t in targets.values() if isinstance(tree.find(t.path).node, ast.ClassDef | code.Function)]


def patches_of(path: str) -> set[str]:
    """Names of the patches that wrap what is at `path`."""
    return {one.name for one in entries() if any(t.path == path and t.wrapper is not None for t in one.targets)}


def sources(tree: Tree) -> dict[str, str]:
    """The stand-in's modules, by name."""
    texts = dict(_MORE)
    classes: dict[tuple[str, str], str] = {}
    for target in wrapped():
        found, owner = tree.find(target.path), target.name.rpartition(".")[0]
        node = tree.find(f"{target.path}.__init__").node if isinstance(found.node, ast.ClassDef) else found.node
        texts.setdefault(target.module, "")
        if owner:
            classes.setdefault((target.module, owner), f"class {owner}:\n")
            classes[target.module, owner] += _function(node, "    ")
        elif isinstance(found.node, ast.ClassDef):
            texts[target.module] += f"class {target.name}:\n{_function(node, '    ')}"
        else:
            texts[target.module] += _function(node, "")
    for (module, _), text in classes.items():
        texts[module] += text
    return texts


def _function(node: ast.AST, indent: str) -> str:
    parameters = [p if p.default is p.empty else p.replace(default=None) for p in code.parameters(node)]
    listed = ", ".join(map(str, parameters))
    if any(p.kind is p.KEYWORD_ONLY for p in parameters) and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        first = next(p for p in parameters if p.kind is p.KEYWORD_ONLY)
        listed = listed.replace(str(first), f"*, {first}", 1)
    marks = [ast.unparse(d) for d in node.decorator_list]
    kept = [mark for mark in marks if mark in ("staticmethod", "classmethod", "contextmanager")]
    above = "".join(f"{indent}@{_IMPORTED.get(mark, mark)}\n" for mark in kept)
    gives = "yield" if "contextmanager" in marks else "return"
    result = "None" if node.name == "__init__" else repr(node.name)
    return f"{above}{indent}def {node.name}({listed}):\n{indent}    {gives} {result}\n"


def cases(texts: dict[str, str]) -> Iterator[tuple[str, str, dict[str, str]]]:
    """What is changed (a path), how, and the stand-in's modules with the change."""
    yield "", "nothing", texts
    for target in wrapped():
        owner, name = target.name.rpartition(".")[::2]
        text = texts[target.module]
        renamed = text.replace(f"class {owner}:", f"class {owner}Anew:") if owner else _renamed(text, name)
        yield target.path, "class renamed" if owner else "renamed", {**texts, target.module: renamed}
        if name != "__init__":  # every class has one
            yield target.path, "renamed", {**texts, target.module: _renamed(text, name)}
        yield target.path, "parameter", {**texts, target.module: _with_parameter(text, owner, name)}


def _renamed(text: str, name: str) -> str:
    return text.replace(f"def {name}(", f"def {name}_anew(").replace(f"class {name}:", f"class {name}Anew:")


def _with_parameter(text: str, owner: str, name: str) -> str:
    """The module with a required parameter more, by name only, of the function (of the class: its constructor)."""
    module = ast.parse(text)
    place = next((node for node in module.body if getattr(node, "name", None) == (owner or name)), module)
    inside = [place] if isinstance(place, ast.FunctionDef) else place.body
    function = next(f for f in inside if f.name == (name if owner or place in inside else "__init__"))
    function.args.kwonlyargs.append(ast.arg("brand_new"))
    function.args.kw_defaults.append(None)
    return ast.unparse(module)


def run(folder: Path, texts: dict[str, str]) -> dict[str, str]:
    """Import the stand-in with the plugin installed, as vLLM's processes do; what could not be applied, and why."""
    for name, text in texts.items():
        file = folder / f"{name.replace('.', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        for package in file.relative_to(folder).parents[:-1]:
            (folder / package / "__init__.py").touch()
    for name in [name for name in sys.modules if name == "vllm" or name.startswith("vllm.")]:
        del sys.modules[name]
    live._MISFITS.clear()
    live.install()
    for name in sorted(texts):
        module = __import__(name, fromlist=["x"])
        assert module.__file__.startswith(str(folder)), module.__file__
    return dict(live._MISFITS)


def calls() -> dict[str, str]:
    """What every wrapped function gives on objects that have no attribute at all; only what is not vLLM's own result.

    So nothing of a vLLM object is touched before it is known to be of an engine with ISD.
    """
    wrong = {}
    for target in wrapped():
        owner, name = target.name.rpartition(".")[::2]
        module = sys.modules[target.module]
        try:
            given = _called(getattr(module, owner) if owner else module, name)
        except Exception as error:
            wrong[target.path] = f"{type(error).__name__}: {error}"
        else:
            if given != name:
                wrong[target.path] = repr(given)
    return wrong


def _called(owner: Any, name: str) -> Any:
    """What the function or method gives; `name` for a constructor that makes an object."""
    called = getattr(owner, name)
    if name == "__init__":
        owner(*_needed(called, 1))
        return name
    method = isinstance(owner, type) and "self" in inspect.signature(called).parameters
    result = called(*([object.__new__(owner)] if method else []), *_needed(called, 1 if method else 0))
    if hasattr(result, "__enter__"):
        with result as given:
            return given
    return name if type(result).__name__ == name else result


def _needed(function: Any, skip: int) -> list[object]:
    """An empty object for each parameter that must be given by place."""
    parameters = list(inspect.signature(function).parameters.values())[skip:]
    by_place = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [object() for p in by_place if p.default is p.empty]


def main(folder: Path) -> None:
    """Print what became of the patches in every case."""
    texts = sources(Tree.installed())
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(folder))
    found = []
    for number, (path, change, changed) in enumerate(cases(texts)):
        place = folder / str(number)
        sys.path[0] = str(place)
        found.append({"path": path, "change": change, "misfits": run(place, changed)})
        if change == "nothing":
            found[-1]["wrong"] = calls()
    print("FOUND " + json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
