"""Greedy output of ISD and R-ISD against plain decoding, with the numeric floor beside it.

    python -m benchmarks.equality [--prompts 60] [--tokens 128] [--batches 1,4,16] [--strides 2,4,8] [--dtype bfloat16]

The floor is plain decoding at one batch size against plain decoding at another: the same text up to ties that another
shape of the same matrix product rounds the other way. ISD at batch b is compared with plain at batch b. For every
difference the first differing place is looked up in plain's own log-probabilities: how far apart the two tokens are.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import time
from typing import Any

from benchmarks import common


def answers(llm: Any, batch: int, count: int, tokens: int) -> list[tuple[list[int], list[dict[int, float]]]]:
    """Greedy answers to the prompts, `batch` at a time: token ids, and the top 2 log-probabilities at each place."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=2)
    found = []
    texts = common.prompts(count)
    for first in range(0, count, batch):
        for output in llm.chat(common.chats(texts[first : first + batch]), params, use_tqdm=False):
            own = output.outputs[0]
            found.append((list(own.token_ids), [{t: x.logprob for t, x in place.items()} for place in own.logprobs]))
    return found


def compare(ours: list, plain: list) -> dict[str, Any]:
    """How many answers are identical, and for the others the gap (nats) between the two tokens where they part."""
    gaps = []
    for (mine, _), (theirs, scores) in zip(ours, plain, strict=True):
        if mine != theirs:
            place = next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
            top = scores[place]
            gaps.append(round(top[theirs[place]] - top.get(mine[place], float("-inf")), 4))
    return {"identical": len(plain) - len(gaps), "of": len(plain), "gaps": sorted(gaps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batches", default="16,4,1")
    parser.add_argument("--strides", default="2,4,8")
    parser.add_argument("--methods", default="isd,risd")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--other-strides", default=None, help="strides to run at batches after the first (default: all)"
    )
    parser.add_argument("--eager", action="store_true", help="no compilation")
    parser.add_argument("--name", default=None, help="results/NAME.json (default equality-DTYPE)")
    args = parser.parse_args()
    batches = [int(b) for b in args.batches.split(",")]
    alone = [int(n) for n in (args.other_strides or args.strides).split(",")]
    options = {"dtype": args.dtype, "enforce_eager": args.eager}
    plain, rows = {}, []
    llm = common.start("plain", 0, **options)
    for batch in batches:
        began = time.time()
        plain[batch] = answers(llm, batch, args.prompts, args.tokens)
        print(f"plain batch {batch}: {time.time() - began:.0f} s", flush=True)
    for a, b in itertools.pairwise(batches):
        rows.append({"method": f"floor: plain {a} / plain {b}", "n": 1, "batch": b, **compare(plain[a], plain[b])})
    del llm  # an engine's end takes vLLM's process groups with it: end each before the next one starts
    gc.collect()
    for method in args.methods.split(","):
        for n in map(int, args.strides.split(",")):
            llm = common.start(method, n, **options)
            for batch in batches:
                if batch != batches[0] and n not in alone:
                    continue
                llm.collective_rpc("isd_stats", args=(True,))
                found = compare(answers(llm, batch, args.prompts, args.tokens), plain[batch])
                tpf = round(llm.collective_rpc("isd_stats")[0]["tpf"], 3)
                rows.append({"method": method, "n": n, "batch": batch, "tpf": tpf, **found})
                print(rows[-1], flush=True)
                common.save(
                    args.name or f"equality-{args.dtype}", {"dtype": args.dtype, "rows": rows, "complete": False}
                )
            del llm
            gc.collect()
    _report(args, rows)


def _report(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "n", "batch", "identical", "largest gap at a difference (nats)", "TPF", title=args.dtype)
    for r in rows:
        gap = str(max(r["gaps"])) if r["gaps"] else "-"
        table.add_row(
            r["method"], str(r["n"]), str(r["batch"]), f"{r['identical']}/{r['of']}", gap, str(r.get("tpf", "-"))
        )
    Console().print(table)
    print(
        common.save(
            args.name or f"equality-{args.dtype}",
            {"dtype": args.dtype, "tokens": args.tokens, "rows": rows, "complete": True},
        )
    )


if __name__ == "__main__":
    main()
