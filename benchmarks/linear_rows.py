"""Products of a model's weights by the number of rows on the CPU: vLLM's (oneDNN) and ours (`kernels.linear`).

    OMP_NUM_THREADS=2 python -m benchmarks.linear_rows [--rows 1,4,7,16,32,64,256,1024] [--name NAME]

All products of one forward (SmolLM2-135M: 30 layers and the output head, for every row; bfloat16, 0.27 GB of weights,
more than a cache holds). Every figure is the least of `--repeats` rounds in which both take turns. "reads" is the time
in which the weights are summed, which is about what reading them takes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import vllm._custom_ops as ops
from rich.console import Console
from rich.table import Table
from vllm_idlm.kernels import linear

from benchmarks import common

LAYERS = 30
SHAPES = [(960, 576), (576, 576), (3072, 576), (576, 1536)] * LAYERS + [(49_152, 576)]  # outputs, inputs
Product = Callable[[torch.Tensor], torch.Tensor]


def products(weights: list[torch.Tensor]) -> dict[str, list[Product]]:
    """Each weight's product by vLLM's op (with weights packed as vLLM packs them) and by ours."""
    linear.load()
    packed = [ops.create_onednn_mm(weight.t(), 32) for weight in weights]
    return {
        "vllm": [lambda x, w=w: ops.onednn_mm(w, x, None) for w in packed],
        "ours": [lambda x, w=w: linear.linear(x, w) for w in weights],
    }


def milliseconds(run: Callable[[], object]) -> float:
    """Of one call."""
    began = time.perf_counter()
    run()
    return (time.perf_counter() - began) * 1e3


def measure(kinds: dict[str, list[Product]], rows: int, repeats: int) -> dict[str, float]:
    """Milliseconds of all products with that many rows, of each kind."""
    given = {size: torch.randn(rows, size).bfloat16() for _, size in SHAPES}
    inputs = [given[size] for _, size in SHAPES]

    def run(calls: list[Product]) -> None:
        for call, x in zip(calls, inputs, strict=True):
            call(x)

    best = dict.fromkeys(kinds, float("inf"))
    for _ in range(repeats):
        for kind, calls in kinds.items():
            best[kind] = min(best[kind], milliseconds(lambda calls=calls: run(calls)))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,4,7,16,32,64,256,1024")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--name", help="results/NAME.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    weights = [(torch.randn(out, size) * size**-0.5).bfloat16() for out, size in SHAPES]
    views = [weight.view(torch.int64) for weight in weights]
    reads = min(milliseconds(lambda: [view.sum() for view in views]) for _ in range(args.repeats))
    kinds, found = products(weights), []
    table = Table("rows", "vLLM's [ms]", "ours [ms]", "vLLM's / ours", title=f"reads: {reads:.1f} ms")
    for rows in map(int, args.rows.split(",")):
        taken = measure(kinds, rows, args.repeats)
        found.append({"rows": rows} | {kind: round(ms, 2) for kind, ms in taken.items()})
        table.add_row(str(rows), *(f"{ms:.1f}" for ms in taken.values()), f"{taken['vllm'] / taken['ours']:.2f}")
    Console().print(table)
    if args.name:
        common.save(args.name, {"reads_ms": round(reads, 2), "threads": torch.get_num_threads(), "products": found})


if __name__ == "__main__":
    main()
