"""Greedy answers by products of the weights: vLLM's, and ours, whose rows do not depend on their company.

    OMP_NUM_THREADS=2 python -m benchmarks.products [--prompts 16] [--tokens 96] [--batches 16,4,1] [--n 4]

For processors where `cpu_linear` `auto` takes ours (bfloat16 without instructions for it). Who gives the same answers
as whom, of: plain decoding by vLLM's products; plain decoding by ours (an engine with ISD whose schedule is stride 1);
R-ISD by ours, coverage last and all; each at every batch size. vLLM's plain decoding against itself is the floor.
"""

from __future__ import annotations

import argparse
import gc
from typing import Any

from benchmarks import common

_PLAINLY = {"schedule": [[1, None, 1]], "cpu_linear": "rows"}
_METHODS: dict[str, tuple[str, dict | None]] = {
    "plain, vLLM's products": ("plain", None),
    "plain, ours": ("risd", _PLAINLY),
    "R-ISD last, ours": ("risd", {"coverage": "last", "cpu_linear": "rows"}),
    "R-ISD all, ours": ("risd", {"coverage": "all", "cpu_linear": "rows"}),
}


def answers(llm: Any, batch: int, count: int, tokens: int) -> list[tuple[int, ...]]:
    """Greedy answers to the prompts, `batch` at a time."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    texts, found = common.prompts(count), []
    for first in range(0, count, batch):
        asked = common.chats(texts[first : first + batch])
        found += [tuple(output.outputs[0].token_ids) for output in llm.chat(asked, params, use_tqdm=False)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--batches", default="16,4,1")
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--name", default="products-cpu", help="results/NAME.json")
    args = parser.parse_args()
    found = {}
    for name, (method, settings) in _METHODS.items():
        llm = common.start(method, args.n, settings=settings, dtype=args.dtype)
        for batch in map(int, args.batches.split(",")):
            found[f"{name}, batch {batch}"] = answers(llm, batch, args.prompts, args.tokens)
        del llm
        gc.collect()  # an engine's end takes vLLM's process groups with it: before the next one starts
    rows = [
        {"answers": name, "identical to": {other: _same(own, found[other]) for other in found if other != name}}
        for name, own in found.items()
    ]
    for row in rows:
        print(row)
    print(common.save(args.name, {**vars(args), "rows": rows}))


def _same(a: list, b: list) -> int:
    return sum(x == y for x, y in zip(a, b, strict=True))


if __name__ == "__main__":
    main()
