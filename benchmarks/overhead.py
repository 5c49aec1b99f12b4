"""OH: the time of one ISD or R-ISD forward over one plain forward, at the same batch and in the same run.

    python -m benchmarks.overhead [--n 4] [--batches 1,4,16] [--rounds 5]

All engines live in this process, with all its threads, and take turns, round by round, so that a drifting machine hits
all alike (engines in processes of their own would be bound to the same core by vLLM's CPU build). A forward is
an engine step in decode (scheduling, model, sampling, ISD's own code); the median over a round's steps is kept, and OH
is the median over rounds of ratios within a round. Host time is what ISD's own Python takes of a step.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks import common


def steps(llm, batch: int, tokens: int) -> list[float]:
    """Durations in ms of the decode steps of `batch` requests, the ramp at both ends cut off."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    engine = llm.llm_engine
    for i, prompt in enumerate(_prompts(llm, batch)):
        engine.add_request(f"{time.time()}-{i}", {"prompt_token_ids": list(prompt)}, params)
    taken, finished = [], 0
    while engine.has_unfinished_requests():
        began = time.perf_counter()
        finished += sum(o.finished for o in engine.step())
        if finished == 0:
            taken.append((time.perf_counter() - began) * 1e3)
    return taken[2:]


def _prompts(llm, batch: int) -> list[list[int]]:
    """Token ids of the shared prompts, or of made-up ones where there is no tokenizer."""
    if llm.model_config.skip_tokenizer_init:
        return [[(7 * i + j) % 2000 for j in range(64)] for i in range(batch)]
    return common.token_ids(llm, common.prompts(batch))


def _start(args: argparse.Namespace) -> dict:
    options, methods = {"dtype": args.dtype, "enforce_eager": args.eager}, args.methods.split(",")
    if args.shape is None:
        return {m: common.start(m, args.n, **options) for m in methods}
    folder = Path(tempfile.mkdtemp())
    # Each engine of a big shape takes its share of the device: KV caches are small, weights are held twice.
    options["kv_cache_memory_bytes"] = 200_000_000 if args.shape == "tiny" else 4_000_000_000
    options["gpu_memory_utilization"] = 0.9 / len(methods)
    options["max_num_seqs"] = max(int(b) for b in args.batches.split(","))
    return {m: common.start_shape(m, args.n, args.shape, folder, rank=args.rank, **options) for m in methods}


def _print(rows: list[dict], n: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "batch", "plain ms", "method", "ms", "OH", "OH min..max", "host ms", "TPF", "speed-up", title=f"n = {n}"
    )
    for r in rows:
        for m in (m for m in r["ms"] if m != "plain"):
            spread = "..".join(map(str, r[m]["OH_min_max"]))
            cells = [r["batch"], r["ms"]["plain"], m, r["ms"][m], r[m]["OH"], spread, r[m]["host_ms"], r[m]["TPF"]]
            cells.append(r[m]["speedup"])
            table.add_row(*map(str, cells))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--methods", default="plain,isd,risd", help="plain first; isd:all is isd with that coverage")
    parser.add_argument("--shape", choices=sorted(common.SHAPES), help="dummy weights of this shape (needs no files)")
    parser.add_argument("--synthetic", type=float, help="accept drafts at this rate (needs Model Runner V2)")
    parser.add_argument("--eager", action="store_true", help="do not compile the models")
    parser.add_argument("--rank", type=int, default=128, help="of the dummy adapter of risd with --shape")
    parser.add_argument("--name", default="overhead-cpu", help="results/NAME.json")
    args = parser.parse_args()
    engines = _start(args)
    methods, ours = tuple(engines), [m for m in engines if m != "plain"]
    batches = [int(b) for b in args.batches.split(",")]
    if args.synthetic is not None:
        for m in ours:
            engines[m].collective_rpc("isd_synthetic", args=(args.synthetic,))
    for batch in batches:  # warm-up: compilation
        for llm in engines.values():
            steps(llm, batch, 12)
    rows = []
    for batch in batches:
        times = {m: [] for m in methods}
        for m in ours:
            engines[m].collective_rpc("isd_stats", args=(True,))
        for _ in range(args.rounds):
            for m, llm in engines.items():
                times[m].append(statistics.median(steps(llm, batch, args.tokens)))
        row = {"batch": batch, "n": args.n, "ms": {m: round(statistics.median(t), 2) for m, t in times.items()}}
        for m in ours:
            ratios = [a / b for a, b in zip(times[m], times["plain"], strict=True)]
            found = engines[m].collective_rpc("isd_stats")[0]
            row[m] = {
                "OH": round(statistics.median(ratios), 3),
                "OH_min_max": [round(min(ratios), 3), round(max(ratios), 3)],
                "TPF": round(found["tpf"], 3),
                "speedup": round(found["tpf"] / statistics.median(ratios), 3),
                "tokens_per_s": round(batch * found["tpf"] / statistics.median(times[m]) * 1e3, 1),
                "host_ms": round(1e3 * found["seconds"] / found["steps"], 3),
            }
        rows.append(row)
    _print(rows, args.n)
    print(common.save(args.name, {"dtype": args.dtype, "shape": args.shape, "synthetic": args.synthetic, "rows": rows}))


if __name__ == "__main__":
    main()
