"""What vLLM's own metrics, and ISD's, counted: read before and after a round."""

from __future__ import annotations

from typing import Any

PLAIN = {  # vLLM's Prometheus counters by the names used here
    "vllm:generation_tokens": "tokens",
    "vllm:prompt_tokens": "prompt_tokens",
    "vllm:num_preemptions": "preemptions",
    "vllm:spec_decode_num_drafts": "verify_forwards",
    "vllm:spec_decode_num_draft_tokens": "drafts",
    "vllm:spec_decode_num_accepted_tokens": "accepted",
}
GAPS = "vllm:inter_token_latency_seconds"  # one observation for every forward after a request's first token
BY_PLACE = "vllm:spec_decode_num_accepted_tokens_per_pos"


def read(llm: Any) -> dict[str, Any]:
    """vLLM's counters of an LLM, those of its engines added up: `PLAIN`'s, `forwards` and `accepted_by_place`."""
    found: dict[str, Any] = dict.fromkeys([*PLAIN.values(), "forwards"], 0) | {"accepted_by_place": []}
    for metric in llm.get_metrics():
        if metric.name in PLAIN:
            found[PLAIN[metric.name]] += int(metric.value)
        elif metric.name == GAPS:
            found["forwards"] += int(metric.count)
        elif metric.name == BY_PLACE:
            found["accepted_by_place"] = add(found["accepted_by_place"], metric.values)
    return found


def add(a: list[int], b: list[int]) -> list[int]:
    """Element by element; the shorter is filled up with zeros."""
    longest = max(len(a), len(b))
    return [x + y for x, y in zip(*(list(z) + [0] * (longest - len(z)) for z in (a, b)), strict=True)]


def total(counts: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums of numbers and of lists of numbers, by name; anything else is left out."""
    made: dict[str, Any] = {}
    for one in counts:
        for name, value in one.items():
            if isinstance(value, list):
                made[name] = add(made.get(name, []), value)
            elif isinstance(value, int | float) and not isinstance(value, bool):
                made[name] = made.get(name, 0) + value
    return made


def since(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What was counted between two readings."""
    minus = {k: [-x for x in v] if isinstance(v, list) else -v for k, v in before.items()}
    return total([after, minus])


def isd(llm: Any) -> dict[str, Any] | None:
    """ISD's own counts since the last call, None for another method; they start again from nothing."""
    found = [stats for stats in llm.collective_rpc("isd_stats", args=(True,)) if stats is not None]
    return {k: v for k, v in found[0].items() if k not in ("trace", "tpf", "rows_per_token")} if found else None
