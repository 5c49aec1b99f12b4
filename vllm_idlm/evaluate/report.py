"""What an evaluation found, as tables for people."""

from __future__ import annotations

import math
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

_LISTED = 8  # differences of a case on the screen; the file holds all


def accuracy(result: dict[str, Any]) -> list[Table]:
    """A table for each benchmark and temperature: accuracy by method, against the reference; shares in per cent."""
    found: dict[tuple[str, float], Table] = {}
    for case in result["cases"]:
        what = (case["benchmark"], case["temperature"])
        if what not in found:
            each = "" if case["samples"] == 1 else f", {case['samples']} answers each"
            found[what] = _table(f"{what[0]}, temperature {what[1]:g}: {case['problems']} problems{each}")
        found[what].add_row(*_cells(case))
    return list(found.values())


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", min_width=8, no_wrap=True)
    widths = {"accuracy [95%]": 15, "difference [95%]": 17, "lost/won": 8, "p": 4, "same": 5}
    for name, width in widths.items():
        table.add_column(name, justify="right", min_width=width, no_wrap=True)
    return table


def _cells(case: dict[str, Any]) -> list[str]:
    low, high = case["interval"]
    cells = [case["method"], f"{100 * case['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"]
    if found := case.get("against_reference"):
        cells.append(f"{100 * found['difference']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]")
        cells += [f"{found['lost']}/{found['won']}", f"{found['p']:.2f}"]
    else:
        cells += ["", "", ""]
    same = case.get("identical")
    return [*cells, "" if same is None else f"{same}/{case['problems']}"]


def differences(result: dict[str, Any]) -> list[str]:
    """Greedy answers that part from the reference's, and how close the two tokens were for the reference itself."""
    lines = []
    for case in result["cases"]:
        found = case.get("differences") or []
        if not found:
            continue
        gaps = [abs(d["gap"]) for d in found if d["gap"] is not None]
        widest = f"; largest gap of the two tokens {max(gaps):.3f} nats" if gaps else ""
        lines.append(
            f"{case['benchmark']}, {case['method']}: {len(found)} greedy answers part from the reference{widest}"
        )
        for d in found[:_LISTED]:
            gap = "" if d["gap"] is None else f"  ({d['gap']:+.3f} nats)"
            end = ["(the end)" if not d[side] else repr(d[side]) for side in ("reference", "other")]
            lines.append(f"  {d['task']} #{d['problem']}: ..{d['before']!r} then {end[0]} or {end[1]}{gap}")
        if len(found) > _LISTED:
            lines.append(f"  and {len(found) - _LISTED} more in the file")
    return lines


def verdict(result: dict[str, Any]) -> list[str]:
    """What it comes to, with what it cannot tell."""
    compared = [c for c in result["cases"] if "against_reference" in c and c["method"] != "floor"]
    lines = []
    if sampled := [c for c in compared if c["temperature"] > 0]:
        low = min(c["against_reference"]["p"] for c in sampled)
        wide = max(max(-c["against_reference"]["low"], c["against_reference"]["high"]) for c in sampled)
        lines.append(
            f"Sampled: {len(sampled)} comparisons, smallest p {low:.3f} (Bonferroni: {min(low * len(sampled), 1):.2f});"
            f" the intervals leave room for a difference of at most {100 * wide:.1f} points."
        )
    if greedy := [c for c in compared if c["temperature"] == 0]:
        same, of = sum(c["identical"] for c in greedy), sum(c["problems"] for c in greedy)
        floor = [c for c in result["cases"] if c["method"] == "floor"]
        beside = "; the reference against itself at the floor's concurrency: "
        beside += f"{sum(c['identical'] for c in floor)} of {sum(c['problems'] for c in floor)}" if floor else "not run"
        lines.append(f"Greedy: {same} of {of} answers identical to the reference's{beside}.")
    return lines


def forwards(result: dict[str, Any]) -> list[str]:
    """Tokens per forward, of the methods that count them."""
    found = {name: c["tpf"] for name, c in result["counters"].items() if not math.isnan(c.get("tpf", math.nan))}
    return [f"Tokens per forward: {', '.join(f'{name} {tpf:.2f}' for name, tpf in found.items())}."] if found else []
