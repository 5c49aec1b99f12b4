"""The step kernels (verify, draft, gate, tail) against the bytes that must move and against vLLM's own chain.

    python -m benchmarks.kernels [--batches 1,8,64] [--vocabulary 151936] [--n 4] [--context 1000] [--name kernels-gpu]

With a GPU the Triton kernels are timed beside vLLM's rejection and Gumbel kernels on the same inputs.
Without one it is a smoke test: the same table, of the plain torch forms; vLLM's kernels need Triton and are left out.
"Limit" is the least number of bytes over the copying bandwidth measured here; a verify forward reads the rows of p and
q once and the row it emits from again, a draft forward reads its mask rows and writes them, the attention of a layer's
extra rows reads the keys and values of the context once (Qwen3-8B's heads, every extra group).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks import common
from benchmarks.kernels import cases


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of a call, after two for warming up."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(call, return_mode="median")
    taken = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        call()
        taken.append((time.perf_counter() - began) * 1e3)
    return statistics.median(taken[2:])


def bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy, read and written bytes counted."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source), device, 5) * 1e3


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--context", type=int, default=1000)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5, help="on a CPU")
    parser.add_argument("--name", help="results/NAME.json")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    speed = bandwidth(device)
    title = f"n = {args.n}, V = {args.vocabulary}, {device.type}, copies at {speed / 1e9:.0f} GB/s"
    table = Table("kernel", "batch", "ms", "MiB", "limit ms", "of limit", "vLLM ms", title=title)
    rows = []
    for batch in map(int, args.batches.split(",")):
        for case in cases.make(batch, args.n, args.vocabulary, args.temperature, args.context, device):
            ms = milliseconds(case.run, device, args.repeats)
            theirs = None if case.vllm is None else milliseconds(case.vllm, device, args.repeats)
            limit = case.bytes / speed * 1e3
            found = {"ms": ms, "bytes": case.bytes, "limit_ms": limit, "vllm_ms": theirs}
            rows.append({"kernel": case.name, "batch": batch, **found})
            cells = [f"{ms:.3f}", f"{case.bytes / 2**20:.1f}", f"{limit:.3f}", f"{limit / ms:.0%}"]
            table.add_row(case.name, str(batch), *cells, "-" if theirs is None else f"{theirs:.3f}")
    Console().print(table)
    if args.name:
        settings = {"n": args.n, "vocabulary": args.vocabulary, "temperature": args.temperature, "device": device.type}
        settings["context"] = args.context
        print(common.save(args.name, {**settings, "bytes_per_second": speed, "rows": rows}))


if __name__ == "__main__":
    main()
