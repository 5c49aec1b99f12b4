"""`idlm plan`: what ISD gives on a model, a machine and a load, before anything is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_idlm.cli.screen import fail, numbers, out


def plan(
    model: Annotated[
        str, typer.Argument(help="Zoo name, qwen3-8b, qwen3-32b, or a folder with a config.json.")
    ] = "idlm-8b",
    hardware: Annotated[str, typer.Option(help="A file of configs/hardware by name, or your own by path.")] = "h100",
    acceptance: Annotated[
        str, typer.Option(help="Share of drafts accepted: one number, or one a place given those before it.")
    ] = "0.9",
    concurrency: Annotated[str, typer.Option(help="Numbers of requests.")] = "1,4,8,16,32,64,128",
    context: Annotated[int, typer.Option(min=1, help="Tokens of a request in the cache, on average.")] = 1000,
    most: Annotated[int, typer.Option(min=2, max=16, help="Largest stride tried, with one acceptance number.")] = 8,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Devices that share the model.")] = 1,
    coverage: Annotated[str, typer.Option(help="last, or auto: with extra groups of masks where they pay.")] = "last",
    rank: Annotated[int, typer.Option(min=0, help="Of the gated adapter (R-ISD); 0: a full I-DLM.")] = 0,
    html: Annotated[Path | None, typer.Option(help="Write the explorer, a page with sliders, to this file.")] = None,
    validate: Annotated[bool, typer.Option("--validate", help="Hold the planner against all measurements.")] = False,
    results: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Folder of measurements, for both of these.")
    ] = None,
) -> None:
    """Predict step times, tokens per second and the best stride, and print the `schedule` to use.

    A roofline model: weights, keys and values, products, all-reduces and a fixed cost, fitted to what was measured.
    """
    from vllm_idlm import planner

    if validate:
        _validate(results)
        return
    try:
        shape, device = planner.shape(model), planner.hardware(hardware)
        made = planner.Plan(shape, device, tensor_parallel, context, rank)
        rates, counts = numbers("--acceptance", acceptance, 0, 1), [int(c) for c in concurrency.split(",")]
        if min(counts) < 1:
            raise planner.PlanError(f"--concurrency {concurrency!r}: numbers of requests are at least 1")
        if coverage not in ("last", "auto"):
            raise planner.PlanError(f"--coverage {coverage!r}: allowed are last and auto")
        if html is not None:
            start = {"rates": rates, "requests": counts[0], "context": context, "tp": tensor_parallel, "rank": rank}
            start |= {"model": _short(model), "hardware": Path(hardware).stem, "n": 4, "groups": 0}
            _explorer(html, start, shape, device, results)
            return
    except (ValueError, OSError) as error:
        fail(str(error), 2)
    _plan(made, rates * (most - 1) if len(rates) == 1 else rates, counts, coverage)


def _plan(made: Any, rates: list[float], counts: list[int], coverage: str) -> None:
    from rich.table import Table

    table = Table("C", "plain ms", "tokens/s", "best n", "groups", "ms", "OH", "TPF", "tokens/s", "faster")
    for count in counts:
        plain, best = made.point(count, 1, rates), made.best(count, rates, coverage == "auto")
        cells = [
            f"{plain['ms']:.2f}",
            f"{plain['tokens_per_s']:.0f}",
            str(best["n"]),
            str(best["groups"]),
            f"{best['ms']:.2f}",
        ]
        cells += [f"{best['OH']:.2f}", f"{best['TPF']:.2f}", f"{best['tokens_per_s']:.0f}"]
        cells.append(f"{best['speedup']:.2f}")
        table.add_row(str(count), *cells)
    out.print(table)
    schedule = made.schedule(rates)
    n = max(int(entry[2] or 1) for entry in schedule)
    held = made.memory(max(counts), n)
    sizes = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in held.items())
    out.print(f"GiB a device at {max(counts)} requests: {sizes} (of {made.hardware.memory / 2**30:.0f})")
    if n > 1:
        found = {"method": "isd", "n": n, "schedule": schedule, "coverage": coverage}
        out.print("speculative_config: " + json.dumps(found), markup=False)
    else:
        out.print("Plain decoding is fastest at every number of requests: ISD does not pay at this acceptance here.")


def _short(model: str) -> str:
    """A model's name on the page."""
    from vllm_idlm import planner

    return planner.ZOO.get(model, model if model in planner.SHAPES else Path(model).name)


def _explorer(file: Path, start: dict[str, Any], shape: Any, device: Any, results: Path | None) -> None:
    from vllm_idlm import explorer

    file.write_text(explorer.page(explorer.tables(start, shape, device, results)), encoding="utf-8")
    out.print(f"Written to {file}: open it in a browser; it needs no network.", markup=False)


def _validate(results: Path | None) -> None:
    """Every measured point beside the planner's, and the error by source."""
    from rich.table import Table

    from vllm_idlm import measured

    found = measured.errors(measured.points(results))
    if not found:
        fail("no measurements found. Fix: --results FOLDER with files of benchmarks/results")
    table = Table("source", "method", "n", "groups", "C", "figure", "measured", "planned", "off")
    for e in found:
        p = e.point
        cells = [p.source, p.method, str(p.n), str(p.groups), str(p.requests), e.figure]
        table.add_row(*cells, f"{e.measured:.3g}", f"{e.planned:.3g}", f"{e.relative:+.0%}")
    out.print(table)
    short = Table("source", "figure", "points", "mean error", "largest")
    for source, figure, count, mean, worst in measured.summary(found):
        short.add_row(source, figure, str(count), f"{mean:.1%}", f"{worst:.0%}")
    out.print(short)
    for file, cpu in measured.elsewhere(results):
        out.print(f"Not held against the planner: {file}, measured on {cpu}, not on {measured.CPU}'s.", markup=False)
    for what, served, planned in measured.tpf_errors(results):
        out.print(
            f"TPF by the formula, {what}: served {served:.3f}, planned {planned:.3f} ({planned / served - 1:+.1%})"
        )
