"""What is compared of vLLM's code: parameters against a wrapper's, attributes of a class, and a fingerprint."""

from __future__ import annotations

import ast
import hashlib
import inspect
from collections.abc import Callable, Sequence

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def parameters(node: ast.AST) -> list[inspect.Parameter]:
    """Return the parameters of a function definition, in order."""
    arguments = node.args
    plain = [*arguments.posonlyargs, *arguments.args]
    required = len(plain) - len(arguments.defaults)
    kinds = [_POSITIONAL[0]] * len(arguments.posonlyargs) + [_POSITIONAL[1]] * len(arguments.args)
    found = [_parameter(a.arg, kind, i >= required) for i, (a, kind) in enumerate(zip(plain, kinds, strict=True))]
    if arguments.vararg:
        found.append(_parameter(arguments.vararg.arg, inspect.Parameter.VAR_POSITIONAL, False))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append(_parameter(argument.arg, inspect.Parameter.KEYWORD_ONLY, default is not None))
    if arguments.kwarg:
        found.append(_parameter(arguments.kwarg.arg, inspect.Parameter.VAR_KEYWORD, False))
    return found


def _parameter(name: str, kind, has_default: bool) -> inspect.Parameter:
    return inspect.Parameter(name, kind, default=None if has_default else inspect.Parameter.empty)


def of_wrapper(wrapper: Callable) -> list[inspect.Parameter]:
    """Return the parameters of a wrapper behind the first, which is the function that it wraps."""
    return list(inspect.signature(wrapper).parameters.values())[1:]


def unfit(ours: Sequence[inspect.Parameter], theirs: Sequence[inspect.Parameter]) -> str | None:
    """Say why a function with parameters `ours` cannot take the place of one with `theirs`; None if it can.

    Every call that theirs takes, by place or by name, must mean the same to ours.
    """
    rest = any(p.kind is p.VAR_POSITIONAL for p in ours)
    names = any(p.kind is p.VAR_KEYWORD for p in ours)
    by_place = [p for p in ours if p.kind in _POSITIONAL]
    only_by_name = {p.name for p in ours if p.kind is p.KEYWORD_ONLY}
    for parameter in theirs:
        if (parameter.kind is parameter.VAR_POSITIONAL and not rest) or (
            parameter.kind is parameter.VAR_KEYWORD and not names
        ):
            return f"takes any number of parameters ({parameter}), ours does not"
    for place, parameter in enumerate(p for p in theirs if p.kind in _POSITIONAL):
        if place >= len(by_place):
            if not rest or not names:
                return f"parameter {parameter.name!r} is new to us"
        elif by_place[place].name != parameter.name:
            return f"parameter {place} is {parameter.name!r}, ours is {by_place[place].name!r}"
        elif parameter.default is not parameter.empty and by_place[place].default is parameter.empty:
            return f"parameter {parameter.name!r} may be left out, ours may not"
    for parameter in theirs:
        if parameter.kind is parameter.KEYWORD_ONLY and not names and parameter.name not in only_by_name:
            return f"parameter {parameter.name!r} is new to us"
    known = {p.name for p in theirs}
    for parameter in ours:
        wanted = parameter.kind in (*_POSITIONAL, parameter.KEYWORD_ONLY) and parameter.default is parameter.empty
        if wanted and parameter.name not in known and not any(p.kind is p.VAR_POSITIONAL for p in theirs):
            return f"parameter {parameter.name!r} is gone"
    return None


def missing(takes: Sequence[str], theirs: Sequence[inspect.Parameter]) -> str | None:
    """Say why a function does not take `takes` in that order among its parameters; None if it does."""
    names = [p.name for p in theirs]
    if [name for name in names if name in takes] == list(takes):
        return None
    return f"takes ({', '.join(names)}), expected ({', '.join(takes)}) among them, in order"


def attributes(node: ast.AST) -> set[str]:
    """Return the names that a class defines, annotates, or sets on `self` or on the class in its methods."""
    found: set[str] = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store) and isinstance(part.value, ast.Name):
            found |= {part.attr} if part.value.id in ("self", "cls") else set()
    for statement in getattr(node, "body", []):
        if isinstance(statement, Function | ast.ClassDef):
            found.add(statement.name)
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            found.add(statement.target.id)
        elif isinstance(statement, ast.Assign):
            found |= {t.id for t in statement.targets if isinstance(t, ast.Name)}
    return found


def fingerprint(node: ast.AST) -> str:
    """Return 12 hexadecimal digits that change when the code does, but not with layout, comments or docstrings."""
    return hashlib.sha256(_canonical(node).encode()).hexdigest()[:12]


def plain_text(node: ast.AST) -> str:
    """Return the code as `ast` writes it, without comments and docstrings: for comparing two versions by eye."""
    copy = ast.parse(ast.unparse(node))
    for part in ast.walk(copy):
        if isinstance(part, Function | ast.ClassDef):
            part.body = _without_docstring(part.body) or [ast.Pass()]
    return ast.unparse(copy)


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0] if body else None
    text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    return body[1:] if text else body


def _canonical(value: object) -> str:
    """The syntax tree as text, the same under every version of Python that parses it the same."""
    if isinstance(value, ast.AST):
        fields = dict(ast.iter_fields(value))
        if isinstance(value, Function | ast.ClassDef):
            fields["body"] = _without_docstring(value.body)
        parts = [f"{name}={_canonical(part)}" for name, part in sorted(fields.items()) if part not in (None, [], ())]
        return f"{type(value).__name__}({','.join(part for part in parts if not part.startswith(_UNSTABLE))})"
    if isinstance(value, list):
        return f"[{','.join(map(_canonical, value))}]"
    return repr(value)


_UNSTABLE = ("ctx=", "kind=", "type_comment=")  # of no meaning, or not in every version
