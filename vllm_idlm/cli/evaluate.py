"""`idlm eval`: quality of ISD against plain decoding, on benchmarks."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_idlm.cli import provenance
from vllm_idlm.cli.screen import err, fail, numbers, out


def evaluate(
    benchmarks: Annotated[list[str] | None, typer.Argument(help="Names in configs/eval, or YAML files.")] = None,
    model: Annotated[str, typer.Option(help="Zoo name, hub id or folder; served here once per method.")] = "",
    methods: Annotated[
        str, typer.Option(help="The reference first; plain, isd, risd, with stride and coverage (risd:8:all).")
    ] = "plain,risd",
    url: Annotated[
        list[str] | None, typer.Option(help="NAME=ADDRESS of a running server instead, the reference first.")
    ] = None,
    temperature: Annotated[str | None, typer.Option(help="As 0,1; 0 is greedy. Default: the benchmark's own.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Instead of the benchmark's.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Sampled answers to each problem, instead.")] = None,
    thinking: Annotated[bool | None, typer.Option(help="Thinking mode, instead of the benchmark's.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first problems of each task.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="BENCHMARK=FOLDER or hub data set, instead.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 16,
    floor: Annotated[int, typer.Option(min=0, help="Requests at a time of the reference's second run; 0: none.")] = 4,
    serve: Annotated[str, typer.Option(help='Flags for the servers: "--dtype float32 --max-model-len 4096".')] = "",
    to: Annotated[Path, typer.Option("--out", help="Folder for answers and result.json.")] = Path("runs/eval"),
    list_: Annotated[bool, typer.Option("--list", help="List the benchmarks and end.")] = False,
) -> None:
    """Answer benchmarks by several methods, held against the first: same answers greedily, same accuracy sampled.

    Through lm-evaluation-harness. Run again after an interruption to go on. Needs the package's extra "eval".
    """
    from vllm_idlm.evaluate.benchmarks import EvalError

    if list_:
        out.print(_listing())
        return
    try:
        asked = _asked(
            benchmarks or [], model, methods, url or [], temperature, limit, data or [], concurrency, floor, serve, to,
            {"max_tokens": max_tokens, "samples": samples, "thinking": thinking},
        )  # fmt: skip
        result = _run(asked)
    except (EvalError, ValueError) as error:
        fail(str(error), 2)
    except KeyboardInterrupt:
        out.print(f"stopped; the same command goes on from the answers in {to}", markup=False)
        raise typer.Exit(130) from None
    _show(result, to)


def _listing() -> Any:
    from rich.table import Table

    from vllm_idlm.evaluate import benchmarks

    table = Table("benchmark", "thinking", "T", "top_p", "top_k", "tokens", "what")
    for name in benchmarks.names():
        b = benchmarks.load(name)
        figures = (b.temperature, b.top_p, b.top_k, b.max_tokens)
        table.add_row(name, {True: "on", False: "off", None: ""}[b.thinking], *map(_cell, figures), b.description)
    return table


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:g}"


def _asked(names, model, methods, urls, heats, limit, data, concurrency, floor, serve, to, changes) -> Any:
    from vllm_idlm.evaluate import benchmarks
    from vllm_idlm.evaluate.run import Asked
    from vllm_idlm.evaluate.server import Method, method

    if not names:
        raise benchmarks.EvalError(f"name benchmarks: {', '.join(benchmarks.names())} (or --list)")
    if bool(model) == bool(urls):
        raise benchmarks.EvalError("give --model (served here, once per method) or --url NAME=ADDRESS, one of the two")
    chosen = [Method(n, url=u) for n, u in _pairs("--url", urls).items()] if urls else [
        method(name) for name in methods.split(",")
    ]  # fmt: skip
    if len({m.name for m in chosen}) < max(len(chosen), 2):
        raise benchmarks.EvalError("at least two different methods are compared, the reference first")
    found = [benchmarks.load(name, **changes) for name in names]
    given = _pairs("--data", data)
    if unknown := set(given) - {b.name for b in found}:
        raise benchmarks.EvalError(f"--data {', '.join(sorted(unknown))}: not among the benchmarks asked for")
    return Asked(
        model, chosen, found, numbers("--temperature", heats, 0, 10) if heats else None, to, concurrency, floor or None,
        limit, shlex.split(serve), given,
    )  # fmt: skip


def _pairs(option: str, given: list[str]) -> dict[str, str]:
    """NAME=VALUE options. Raises EvalError."""
    from vllm_idlm.evaluate.benchmarks import EvalError

    if bad := [text for text in given if not all(text.partition("=")[::2])]:
        raise EvalError(f"{option} {bad[0]!r}: write NAME=VALUE")
    return dict(text.split("=", 1) for text in given)


def _run(asked: Any) -> dict[str, Any]:
    """The evaluation under a progress bar; its record."""
    from dataclasses import asdict

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from vllm_idlm.evaluate.run import Evaluation

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err) as progress:
        bar = progress.add_task("preparing the problems", total=None)

        def report(what: str, done: int, total: int) -> None:
            progress.update(bar, description=what, completed=done, total=total or None)

        result = Evaluation(asked, report).run()
    told = {
        "model": asked.model, "methods": [asdict(m) for m in asked.methods], "limit": asked.limit, "data": asked.data,
        "benchmarks": [b.model_dump(exclude_none=True) for b in asked.benchmarks], "flags": asked.flags,
        "concurrency": asked.concurrency, "floor": asked.floor,
    }  # fmt: skip
    record = {"provenance": provenance.collect(), "asked": told, **result}
    (asked.out / "result.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def _show(result: dict[str, Any], to: Path) -> None:
    from vllm_idlm.evaluate import report

    for table in report.accuracy(result):
        out.print(table)
    for line in [*report.differences(result), "", *report.verdict(result), *report.forwards(result)]:
        out.print(line, markup=False)
    out.print(f"Written to {to}/result.json", markup=False)
