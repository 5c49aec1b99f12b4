"""`python -m vllm_idlm.ledger`: every patch, what it is for, and whether it fits a vLLM.

    python -m vllm_idlm.ledger                         # the installed vLLM, its modules imported
    python -m vllm_idlm.ledger --source TREE_OR_WHEEL  # another one: its source is read, nothing of it imported
                                                       # ("installed": the installed one's)
    python -m vllm_idlm.ledger --source .. --reviewed  # enter its code as reviewed (when you have read --diff)
    python -m vllm_idlm.ledger --diff OLD NEW          # what changed of all that the patches rely on

Exit status 1 where something does not fit; with --strict also where nobody has reviewed it.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_idlm import ledger, plugin  # noqa: F401  the import enters the patches
from vllm_idlm.patching import Patch, Tree, code, entries, fit, live, uses
from vllm_idlm.patching.tree import TreeError

_SIGNS = {fit.FITS: "green", fit.UNREVIEWED: "yellow", fit.MISFIT: "bold red"}
console = Console(highlight=False)


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m vllm_idlm.ledger", description=__doc__.splitlines()[0])
    parser.add_argument("--source", metavar="TREE_OR_WHEEL", help="an unpacked vLLM or a wheel, read, not imported")
    parser.add_argument("--brief", action="store_true", help="only patches that do not fit, or that nobody reviewed")
    parser.add_argument("--strict", action="store_true", help="exit status 1 for unreviewed code too")
    parser.add_argument("--reviewed", action="store_true", help="with --source: enter its code as reviewed")
    parser.add_argument("--diff", nargs=2, metavar=("OLD", "NEW"), help="what changed from one vLLM to another")
    asked = parser.parse_args(arguments)
    if asked.reviewed and not asked.source:
        parser.error("--reviewed needs --source")
    try:
        if asked.diff:
            return differences(Tree(asked.diff[0]), Tree(asked.diff[1]))
        if not asked.source:
            return installed(asked.brief, asked.strict)
        tree = Tree.installed() if asked.source == "installed" else Tree(asked.source)
        if tree is None:
            parser.error("no vLLM is installed")
        return source(tree, asked.brief, asked.strict, asked.reviewed)
    except TreeError as error:
        print(error, file=sys.stderr)
        return 2


def installed(brief: bool, strict: bool) -> int:
    """List the patches as they are in this process, with the installed vLLM."""
    from vllm_idlm.cli.screen import quiet

    quiet()
    plugin.register()
    states = live.check(imports=True)
    return _tell(states, live.vllm_version(), [], brief, strict)


def source(tree: Tree, brief: bool, strict: bool, reviewed: bool) -> int:
    """List the patches as they would be with the vLLM of a source tree, and what the plugin imports and calls of it."""
    if reviewed:
        known = {**fit.reviewed(), tree.version: fit.marks(entries(), tree)}
        fit.REVIEWED.write_text(json.dumps(dict(sorted(known.items())), indent=1, sort_keys=True) + "\n")
        fit.reviewed.cache_clear()
    return _tell(fit.states(entries(), tree), tree.version, uses.problems(tree), brief, strict)


def differences(old: Tree, new: Tree) -> int:
    """Print how the code that the patches rely on changed; comments and docstrings are left out."""
    changed = lines = 0
    seen = {}
    for one in entries():
        for path in fit.marks([one], new) | fit.marks([one], old):
            seen.setdefault(path, []).append(one.name)
    for path, names in sorted(seen.items()):
        before, after = (_text(tree, path) for tree in (old, new))
        delta = list(difflib.unified_diff(before, after, f"{path} {old.version}", new.version, lineterm="", n=2))
        if delta:
            changed, lines = changed + 1, lines + sum(line[:1] in "+-" for line in delta[2:])
            print(f"\n# {', '.join(names)}", *delta, sep="\n")
    print(f"\n{old.version} to {new.version}: {changed} of {len(seen)} functions changed, {lines} lines")
    return 0


def _text(tree: Tree, path: str) -> list[str]:
    found = tree.find(path)
    return code.plain_text(found.node).splitlines() if found is not None else []


def _tell(states: dict[str, fit.State], version: str, problems: list[str], brief: bool, strict: bool) -> int:
    for one in entries():
        if not (brief and states[one.name].kind == fit.FITS):
            _show(one, states[one.name], brief)
    for problem in problems:
        console.print(f"[bold red]does not fit[/bold red]  {escape(problem)}")
    kinds = [state.kind for state in states.values()]
    wrong, unreviewed = kinds.count(fit.MISFIT), kinds.count(fit.UNREVIEWED)
    words = f"vLLM {version}: {len(kinds) - wrong} of {len(kinds)} patches fit"
    words += f", {unreviewed} of them on code that nobody has reviewed" if unreviewed else ""
    words += f"; {len(problems)} of the plugin's imports and calls do not" if problems else ""
    console.print(words)
    return int(wrong > 0 or bool(problems) or (strict and unreviewed > 0))


def _show(one: Patch, state: fit.State, brief: bool) -> None:
    sign = f"[{_SIGNS[state.kind]}]{state.kind}[/]"
    console.print(f"[bold]{one.name}[/bold]  {sign}  {one.module}")
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    optional = "; without it things are slower, not wrong" if one.optional else ""
    rows = {"what": one.what, "why": one.why, "for": one.words() + optional, "until": one.removed_by}
    for name, text in ({} if brief else rows).items():
        table.add_row(name, escape(text))
    for detail in state.details:
        table.add_row("state", escape(detail))
    console.print(table)


if __name__ == "__main__":
    raise SystemExit(main())
