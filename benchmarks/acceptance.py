"""TPF and acceptance of the embedded model's adapter as served by vLLM, beside the forecast made without serving.

    python -m benchmarks.acceptance [--prompts 48] [--tokens 128] [--n 4] [--temperatures 0,1.0]
                                    [--coverage last,all] [--lora FOLDER] [--no-forecast]

The prompts are held out by hash from `idlm data`'s recipe, as in training. Plain decoding answers them; the forecast is
`training.acceptance` over these very answers; then ISD answers the same prompts. Greedy, both see the same text;
sampled, two draws of the same distribution. E is what TPF would be without any cold forward, from the acceptance that
was measured: 1 + a1 + a1 a2 + ..
"""

from __future__ import annotations

import argparse
import gc
from typing import Any

from vllm_idlm.proposers.coverage import expected_tokens

from benchmarks import common
from vllm_idlm.data import keys, prompts


def held_out(count: int, share: float = 0.03, kinds: int = 12) -> list[list[dict[str, str]]]:
    """`count` chats of the recipe's held-out side, spread over its kinds."""
    found = [p for p in prompts.built_in("chat", 8192, 0) if keys.side(p.key, share) == keys.EVAL]
    by_kind: dict[str | None, list] = {}
    for prompt in found:
        by_kind.setdefault(prompt.kind, []).append(list(prompt.messages))
    each = -(-count // len(by_kind))
    return [chat for chats in by_kind.values() for chat in chats[:each]][:count]


def answer(llm: Any, chats: list, temperature: float, tokens: int) -> list[tuple[list[int], list[int]]]:
    """Token ids of prompt and answer of each chat; answers may end before `tokens`. No request has its own seed."""
    from vllm import SamplingParams

    outputs = llm.chat(chats, SamplingParams(temperature=temperature, max_tokens=tokens), use_tqdm=False)
    return [(list(o.prompt_token_ids), list(o.outputs[0].token_ids)) for o in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--temperatures", default="0,1.0")
    parser.add_argument("--coverage", default="last,all")
    parser.add_argument("--lora", default=None, help="default: the zoo's")
    parser.add_argument("--name", default="acceptance-cpu", help="results/NAME.json")
    parser.add_argument("--forecast", action=argparse.BooleanOptionalAction, default=True, help="the longest part")
    args = parser.parse_args()
    chats, temperatures = held_out(args.prompts), [float(t) for t in args.temperatures.split(",")]
    llm = common.start("plain", 0, enforce_eager=True)
    plain = {t: answer(llm, chats, t, args.tokens) for t in temperatures}
    del llm
    gc.collect()
    rows = []
    for coverage in args.coverage.split(","):
        settings = {"coverage": coverage, **({"lora": args.lora} if args.lora else {})}
        llm = common.start("risd", args.n, settings=settings, enforce_eager=True)
        rows += [{"coverage": coverage, **_serve(llm, chats, t, args.tokens, plain[t])} for t in temperatures]
        del llm
        gc.collect()
    forecasts = _forecasts(args, plain) if args.forecast else {}
    for row in rows:
        if (row["temperature"], row["coverage"]) in forecasts:
            row["forecast"] = forecasts[row["temperature"], row["coverage"]]
            row["off"] = row["forecast"]["tpf"] / row["tpf"] - 1
        print({k: v for k, v in row.items() if k != "served"}, flush=True)
    print(common.save(args.name, {"prompts": len(chats), "tokens": args.tokens, "n": args.n, "rows": rows}))


def _serve(llm: Any, chats: list, temperature: float, tokens: int, plain: list) -> dict[str, Any]:
    llm.collective_rpc("isd_stats", args=(True,))
    made = answer(llm, chats, temperature, tokens)
    found = llm.collective_rpc("isd_stats")[0]
    expected = without_cold(found["accepted_per_position"], found["drafted_per_position"])
    same = sum(a == b for a, b in zip(made, plain, strict=True)) if temperature == 0 else None
    shares = {"E": expected, "tpf_of_E": found["tpf"] / expected, "cold": found["cold"] / found["forwards"]}
    return {"temperature": temperature, "tpf": found["tpf"], **shares, "identical": same, "served": found}


def without_cold(accepted: list[int], drafted: list[int]) -> float:
    """E from counts by place: each draft's acceptance is given that those before it were accepted.

    accepted, drafted: drafts accepted and drafts verified at each place of the row.
    """
    tried = drafted[:1] + [min(pair) for pair in zip(drafted[1:], accepted, strict=False)]
    return expected_tokens([ok / count if count else 0.0 for ok, count in zip(accepted, tried, strict=True)])


def _forecasts(args: argparse.Namespace, plain: dict[float, list]) -> dict[tuple[float, str], dict[str, Any]]:
    from vllm_idlm.training import acceptance, start
    from vllm_idlm.training.layout import Sample

    model, _, mask = start.for_evaluation("smollm2-135m-risd", args.lora, None, "bfloat16")
    found = {}
    for temperature, answers in plain.items():
        samples = [Sample(prompt, made) for prompt, made in answers if len(made) >= 3]
        measured = list(acceptance.rates(model, samples, args.n - 1, mask, (temperature,)))
        for name in ("last", "all"):
            found[temperature, name] = acceptance.forecast(measured, temperature, args.n - 1, name == "all").table()
    return found


if __name__ == "__main__":
    main()
