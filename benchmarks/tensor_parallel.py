"""ISD under tensor parallelism against one rank: start-up, time of a forward, and OH, in the same run.

    python -m benchmarks.tensor_parallel [--backend mp] [--ranks 2] [--shape small] [--rounds 5]

Plain and R-ISD engines of one rank and of several live at once and take turns, round by round; a forward is an engine
step in decode. OH is the time of an R-ISD forward over a plain one with as many ranks, within a round; ISD adds no
collective, so it should not grow with ranks. Each rank has one thread. Weights are dummies: time does not depend on
them, and the drafts are all rejected. Start-up is from the constructor to the engine that answers, one at a time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks import common
from benchmarks.overhead import steps

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def _start(args: argparse.Namespace, method: str, ranks: int, folder: Path) -> tuple:
    """An engine, and the seconds that its start took."""
    options = {"dtype": args.dtype, "enforce_eager": True, "kv_cache_memory_bytes": 200_000_000, "max_num_seqs": 16}
    if ranks > 1:
        options |= {"tensor_parallel_size": ranks, "distributed_executor_backend": args.backend}
    began = time.perf_counter()
    llm = common.start_shape(method, args.n, args.shape, folder, rank=args.rank, **options)
    steps(llm, 1, 4)
    return llm, time.perf_counter() - began


def _measure(engines: dict, batch: int, args: argparse.Namespace) -> dict:
    """Median times of a forward by engine, and OH by number of ranks."""
    times: dict[tuple, list[float]] = {key: [] for key in engines}
    for _ in range(args.rounds):
        for key, (llm, _) in engines.items():
            times[key].append(statistics.median(steps(llm, batch, args.tokens)))
    row = {"batch": batch, "ms": {f"{m} x{r}": round(statistics.median(t), 3) for (m, r), t in times.items()}}
    for ranks in sorted({r for _, r in engines}):
        pairs = zip(times["risd", ranks], times["plain", ranks], strict=True)
        ratios = [ours / plain for ours, plain in pairs]
        spread = [round(min(ratios), 3), round(max(ratios), 3)]
        row[f"x{ranks}"] = {"OH": round(statistics.median(ratios), 3), "OH_min_max": spread}
        found = engines["risd", ranks][0].collective_rpc("isd_stats", args=(True,))
        row[f"x{ranks}"]["host_ms"] = round(1e3 * found[0]["seconds"] / found[0]["steps"], 3)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--backend", choices=("mp", "ray"), default="mp")
    parser.add_argument("--shape", choices=sorted(common.SHAPES), default="small")
    parser.add_argument("--rank", type=int, default=32, help="of the dummy adapter")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--name", default="tensor-parallel-cpu", help="results/NAME.json")
    args = parser.parse_args()
    import vllm.entrypoints.llm  # noqa: F401  (so that the first engine's start does not count it; ranks do import it)

    engines = {}
    for ranks in (1, args.ranks):
        for method in ("plain", "risd"):
            if (method, ranks, args.backend) == ("plain", args.ranks, "ray") and not _on_gpu():
                parser.error(
                    "--backend ray: plain decoding on Ray needs GPUs (vLLM's CPU platform refuses Ray); use mp"
                )
            engines[method, ranks] = _start(args, method, ranks, Path(tempfile.mkdtemp()))
    for batch in (int(b) for b in args.batches.split(",")):  # warm-up
        for llm, _ in engines.values():
            steps(llm, batch, 8)
    for key in engines:
        if key[0] == "risd":
            engines[key][0].collective_rpc("isd_stats", args=(True,))
    rows = [_measure(engines, int(batch), args) for batch in args.batches.split(",")]
    started = {f"{m} x{r}": round(seconds, 1) for (m, r), (_, seconds) in engines.items()}
    _print(rows, args)
    result = {"backend": args.backend, "shape": args.shape, "dtype": args.dtype, "start_seconds": started, "rows": rows}
    print(f"start-up, s: {started}")
    print(common.save(args.name, result))


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _print(rows: list[dict], args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("batch", "ranks", "plain ms", "R-ISD ms", "OH", "OH min..max", "host ms", title=f"n = {args.n}")
    for row in rows:
        for ranks in (1, args.ranks):
            own, ms = row[f"x{ranks}"], row["ms"]
            spread = "..".join(map(str, own["OH_min_max"]))
            times = ms[f"plain x{ranks}"], ms[f"risd x{ranks}"]
            table.add_row(*map(str, (row["batch"], ranks, *times, own["OH"], spread, own["host_ms"])))
    Console().print(table)


if __name__ == "__main__":
    main()
