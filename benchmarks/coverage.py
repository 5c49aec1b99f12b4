"""Speed by coverage: plain decoding and R-ISD with each coverage, in one run, at several numbers of requests.

    python -m benchmarks.coverage [--n 4] [--coverage last,all] [--batches 1,4,16] [--rounds 5] [--tokens 96]

All engines live in this process, with all its threads, and take turns, round by round, who begins moving on, so that a
drifting machine hits all alike. A round is one batch of greedy requests of one length, prompts included; its
figure is the tokens of the answers by the seconds it took, and a speed-up is the median over rounds of the ratio to
plain decoding within the round; beside it stands its 95% interval by bootstrap over the rounds. `--coverage
control,auto` adds a second plain engine, which shows what the place of an engine in the process is worth.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np

from benchmarks import common

_PLAIN = ("plain", "control")


def rate(llm: Any, prompts: list[list[int]], tokens: int, temperature: float) -> float:
    """Tokens a second of one batch of answers of `tokens` tokens each."""
    from vllm import SamplingParams, TokensPrompt

    params = SamplingParams(temperature=temperature, max_tokens=tokens, ignore_eos=True, detokenize=False)
    asked = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    began = time.perf_counter()
    llm.generate(asked, params, use_tqdm=False)
    return len(prompts) * tokens / (time.perf_counter() - began)


def prompts(llm: Any, rounds: int, batch: int) -> list[list[list[int]]]:
    """Prompts for each round, as token ids, different ones while there are some; the last batch is the warm-up's."""
    wanted = (rounds + 1) * batch
    texts = common.prompts()
    ids = common.token_ids(llm, (texts * -(-wanted // len(texts)))[:wanted])
    return [ids[i * batch : (i + 1) * batch] for i in range(rounds + 1)]


def interval(ratios: list[float]) -> list[float] | None:
    """The 95% bootstrap interval of the median of `ratios`; None of less than six."""
    from scipy.stats import bootstrap

    if len(ratios) < 6:
        return None
    found = bootstrap((ratios,), np.median, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return [round(float(found.low), 3), round(float(found.high), 3)]


def measure(engines: dict[str, Any], batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """One batch size: rounds of all engines in turn."""
    rounds = prompts(engines["plain"], args.rounds, batch)
    for name, llm in engines.items():
        rate(llm, rounds[-1], 24, args.temperature)
        if name not in _PLAIN:
            llm.collective_rpc("isd_stats", args=(True,))
    rates: dict[str, list[float]] = {name: [] for name in engines}
    order = list(engines)
    for asked in rounds[:-1]:
        for name in order:
            rates[name].append(rate(engines[name], asked, args.tokens, args.temperature))
        order = order[1:] + order[:1]
    row: dict[str, Any] = {"batch": batch, "plain": {"tokens_per_s": round(statistics.median(rates["plain"]), 1)}}
    for name in (n for n in engines if n != "plain"):
        ratios = [a / b for a, b in zip(rates[name], rates["plain"], strict=True)]
        row[name] = {
            "tokens_per_s": round(statistics.median(rates[name]), 1),
            "speedup": round(statistics.median(ratios), 3),
            "speedup_min_max": [round(min(ratios), 3), round(max(ratios), 3)],
            "speedup_95": interval(ratios),
        }
        if name not in _PLAIN:
            row[name] |= counted(engines[name].collective_rpc("isd_stats")[0])
    return row


def counted(found: dict[str, Any]) -> dict[str, float]:
    """What ISD counted itself."""
    return {
        "TPF": round(found["tpf"], 3),
        "cold": round(found["cold"] / found["forwards"], 3),
        "host_ms": round(1e3 * found["seconds"] / found["steps"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--coverage", default="last,all")
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--linear", default="auto", help="cpu_linear of the engines with ISD: whose products on CPUs")
    parser.add_argument("--eager", action="store_true", help="do not compile the models")
    parser.add_argument("--name", default="coverage-cpu", help="results/NAME.json")
    args = parser.parse_args()
    options = {"dtype": args.dtype, "enforce_eager": args.eager}
    engines = {"plain": common.start("plain", 0, **options)}
    for coverage in args.coverage.split(","):
        method, settings = ("plain", None) if coverage == "control" else ("risd", {"cpu_linear": args.linear})
        engines[coverage] = common.start(f"{method}:{coverage}", args.n, settings=settings, **options)
    rows = []
    for batch in map(int, args.batches.split(",")):
        rows.append(measure(engines, batch, args))
        print(rows[-1], flush=True)
    given = {k: getattr(args, k) for k in ("n", "tokens", "rounds", "temperature", "dtype", "linear", "eager")}
    print(common.save(args.name, {**given, "rows": rows}))


if __name__ == "__main__":
    main()
