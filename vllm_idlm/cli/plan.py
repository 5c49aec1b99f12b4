"""`idlm plan`: what ISD gives on a model, a machine and a load, before anything is started."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from vllm_idlm.cli.screen import fail, numbers, out


def plan(
    model: Annotated[str, typer.Argument(help="Zoo name, qwen3-8b, qwen3-32b, or a folder with a config.json.")],
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
) -> None:
    """Predict step times, tokens per second and the best stride, and print the `schedule` to use.

    A roofline model: weights, keys and values, products, all-reduces and a fixed cost, fitted to what was measured.
    """
    from rich.table import Table

    from vllm_idlm import planner

    try:
        made = planner.Plan(planner.shape(model), planner.hardware(hardware), tensor_parallel, context, rank)
        rates, counts = numbers("--acceptance", acceptance, 0, 1), [int(c) for c in concurrency.split(",")]
        if min(counts) < 1:
            raise planner.PlanError(f"--concurrency {concurrency!r}: numbers of requests are at least 1")
        if coverage not in ("last", "auto"):
            raise planner.PlanError(f"--coverage {coverage!r}: allowed are last and auto")
    except ValueError as error:
        fail(str(error), 2)
    if len(rates) == 1:
        rates *= most - 1
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
