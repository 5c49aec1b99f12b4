"""From rounds to figures: plain arithmetic on what `worker` reports. Times in ms, rates in tokens/s.

TPF                 tokens after a request's first, by the forwards that gave them
OH                  time of a decode step over the first method's, within a round; the median over rounds
speed-up            total tokens/s over the first method's, within a round; the median over rounds
rows                of one forward: 1 + drafts verified, and ISD's mask slots
efficiency          TPF^2 / rows, the paper's compute efficiency: 1 for plain decoding
acceptance[i]       share of the forwards with drafts that accepted draft i + 1 (and so those before it)
given_before[i]     the same, given that those before it were accepted
alpha               accepted drafts by judged ones (accepted, and the first one rejected of a forward): sampled, a
                    draft is accepted with probability sum min(p, q), so this is the mean of that over the positions
                    that were judged (introspective acceptance)
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from vllm_idlm.bench import counters

Round = dict[str, Any]


def of(rounds: Sequence[Round], first: Sequence[Round | None]) -> dict[str, Any]:
    """Figures of a method at one concurrency and temperature. first: the first method's round beside each, if any."""
    pairs = [(mine, other) for mine, other in zip(rounds, first, strict=True) if other]
    answers = [answer for one in rounds for answer in one["answers"]]
    return {
        "rounds": len(rounds),
        "requests": len(answers),
        "tokens": sum(len(answer["token_ids"]) for answer in answers),
        "tokens_per_s": spread([rate(one) for one in rounds]),
        "tokens_per_s_request": _median(map(own_rate, answers)),
        "speedup": spread([rate(mine) / rate(other) for mine, other in pairs]),
        "step_ms": spread([step_ms(one) for one in rounds if one["steps"]]),
        "OH": spread([step_ms(a) / step_ms(b) for a, b in pairs if a["steps"] and b["steps"]]),
        "ttft_ms": percentiles([1e3 * answer["ttft"] for answer in answers]),
        "itl_ms": percentiles([1e3 * gap for answer in answers for gap in answer["gaps"]]),
        "identical": sum(same_answers(mine, other) for mine, other in pairs),
        "compared": sum(len(mine["answers"]) for mine, _ in pairs),
        "resident_bytes": max(one["resident_bytes"] for one in rounds),
        "device_bytes": max((one["device_bytes"] or 0 for one in rounds), default=0) or None,
        **forwards(rounds),
    }


def forwards(rounds: Sequence[Round]) -> dict[str, Any]:
    """What a method's forwards gave."""
    count = events(rounds)
    tokens = sum(len(answer["token_ids"]) - answer["first"] for one in rounds for answer in one["answers"])
    vllm = counters.total([one["vllm"] for one in rounds])
    isd = counters.total([one["isd"] for one in rounds if one["isd"]])
    tpf = tokens / count if count else None
    rows = _rows(count, vllm, isd)
    verify = vllm["verify_forwards"]
    judged, drafted = _judged(vllm, isd)
    by_place = vllm["accepted_by_place"][: places(vllm, isd)]
    kinds = {"verify": verify, "cold": count - verify}
    if isd:
        kinds |= {name: isd[name] for name in ("accepted_all", "rejected")}
    return {
        "forwards": count,
        "kinds": kinds,
        "TPF": tpf,
        "rows": rows,
        "efficiency": tpf**2 / rows if tpf else None,
        "accepted_length": 1 + vllm["accepted"] / verify if verify else None,
        "acceptance": [n / verify for n in by_place] if verify else [],
        "given_before": [a / d if d else None for a, d in zip(by_place, drafted, strict=False)],
        "alpha": vllm["accepted"] / judged if judged else None,
    }


def _rows(count: int, vllm: Round, isd: Round) -> float:
    """Rows of a forward of one request: those of ISD are counted where they are known, in the worker."""
    if isd:
        done = isd["accepted_all"] + isd["rejected"] + isd["cold"]
        return isd["rows"] / done if done else 1.0
    return 1 + vllm["drafts"] / count if count else 1.0


def places(vllm: Round, isd: Round) -> int:
    """Drafts a forward has at the most; to vLLM the mask slots of ISD are places too."""
    return len(isd["drafted_per_position"]) if isd else len(vllm["accepted_by_place"])


def _judged(vllm: Round, isd: Round) -> tuple[int, list[int]]:
    """Drafts that were judged at all, and by place: accepted, or the first of a forward that was not.

    ISD says how many drafts stood at each place. Elsewhere vLLM has their sum alone, and every forward with drafts is
    taken to have had the mean number of them.
    """
    accepted = vllm["accepted_by_place"]
    verify = vllm["verify_forwards"]
    stood = isd["drafted_per_position"] if isd else [verify] * len(accepted)
    before = [verify, *accepted]
    judged = [min(pair) for pair in zip(stood, before, strict=False)]
    if isd or not verify:
        return sum(judged), judged
    return min(sum(judged), vllm["drafts"]), judged


def events(rounds: Sequence[Round]) -> int:
    """Decode forwards of requests: engine steps that gave a request tokens, after its first ones."""
    return sum(len(answer["gaps"]) for one in rounds for answer in one["answers"])


def rate(one: Round) -> float:
    """Tokens/s of all requests of a round."""
    return sum(len(answer["token_ids"]) for answer in one["answers"]) / one["seconds"]


def own_rate(answer: dict[str, Any]) -> float | None:
    """Tokens/s of one request once its first token is there."""
    took = answer["latency"] - answer["ttft"]
    return (len(answer["token_ids"]) - answer["first"]) / took if took > 0 else None


def step_ms(one: Round) -> float:
    """The median decode step of a round in which all seats were taken."""
    return 1e3 * statistics.median(one["steps"])


def same_answers(mine: Round, other: Round) -> int:
    """Answers with the very tokens of the other method's."""
    pairs = zip(mine["answers"], other["answers"], strict=True)
    return sum(a["token_ids"] == b["token_ids"] for a, b in pairs)


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median, least and most; None of nothing."""
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """p50 and p99 (linear between neighbours); None of nothing."""
    return {"p50": percentile(values, 0.5), "p99": percentile(values, 0.99)} if values else None


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of them are."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _median(values: Any, pick: Callable[[list[float]], float] = statistics.median) -> float | None:
    found = [value for value in values if value is not None]
    return pick(found) if found else None
