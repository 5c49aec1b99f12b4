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
import pickle
import time
from typing import Any

from benchmarks import common

_TOP = 8  # log-probabilities kept at each place, to weigh the token that the other run chose


def answers(llm: Any, batch: int, count: int, tokens: int) -> list[tuple[list[int], list[dict[int, float]]]]:
    """Greedy answers to the prompts, `batch` at a time: token ids, and the highest log-probabilities at each place."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=_TOP)
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
    name = args.name or f"equality-{args.dtype}"
    plain = _plain(args, batches, name)
    rows = []
    for a, b in itertools.pairwise(batches):
        rows.append({"method": f"floor: plain {a} / plain {b}", "n": 1, "batch": b, **compare(plain[a], plain[b])})
        print(rows[-1], flush=True)
    for method, n in itertools.product(args.methods.split(","), map(int, args.strides.split(","))):
        llm = common.start(method, n, dtype=args.dtype, enforce_eager=args.eager)
        for batch in batches if n in alone else batches[:1]:
            llm.collective_rpc("isd_stats", args=(True,))
            began = time.time()
            found = compare(answers(llm, batch, args.prompts, args.tokens), plain[batch])
            tpf = round(llm.collective_rpc("isd_stats")[0]["tpf"], 3)
            rows.append({"method": method, "n": n, "batch": batch, "tpf": tpf, **found})
            print(f"{time.time() - began:.0f} s", rows[-1], flush=True)
            common.save(name, {"dtype": args.dtype, "rows": rows, "complete": False})
        del llm
        gc.collect()
    _report(args, rows)


def _plain(args: argparse.Namespace, batches: list[int], name: str) -> dict[int, list]:
    """Plain decoding's answers by batch size; kept in a file between runs with the same arguments."""
    kept = common.RESULTS / f".plain-{name}.pickle"
    key = (args.prompts, args.tokens, args.dtype, args.eager, _TOP)
    found: dict[int, list] = {}
    if kept.exists():
        with kept.open("rb") as file:
            of, found = pickle.load(file)
        found = found if of == key else {}
    if missing := [b for b in batches if b not in found]:
        llm = common.start("plain", 0, dtype=args.dtype, enforce_eager=args.eager)
        for batch in missing:
            began = time.time()
            found[batch] = answers(llm, batch, args.prompts, args.tokens)
            print(f"plain batch {batch}: {time.time() - began:.0f} s", flush=True)
            with kept.open("wb") as file:
                pickle.dump((key, found), file)
        del llm  # an engine's end takes vLLM's process groups with it: end each before the next one starts
        gc.collect()
    return found


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
