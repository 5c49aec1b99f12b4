"""Make up rounds of a comparison, as `idlm bench` records them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_idlm.bench import counters
from vllm_idlm.bench.config import Bench
from vllm_idlm.bench.store import Place


def asked(tmp_path: Path, **fields: Any) -> Bench:
    """A configuration that writes below `tmp_path`: plain decoding and ISD, unless `fields` say otherwise."""
    return Bench(**{"model": "m", "out": str(tmp_path / "out"), "methods": ["plain", "isd"], **fields})


def answer(events: list[int], step: float = 0.1) -> dict[str, Any]:
    """An answer that got `events` tokens at each engine step."""
    gaps = [step] * (len(events) - 1)
    tokens = list(range(sum(events)))
    times = {"ttft": 0.5, "latency": 0.5 + sum(gaps), "gaps": gaps}
    return {"token_ids": tokens, "prompt_tokens": 3, "first": events[0], **times}


def plain_round(answers: int = 2, tokens: int = 11, step: float = 0.1) -> dict[str, Any]:
    """A round of plain decoding."""
    made = [answer([1] * tokens, step) for _ in range(answers)]
    vllm = dict.fromkeys([*counters.PLAIN.values()], 0) | {"accepted_by_place": []}
    vllm |= {"tokens": answers * tokens, "forwards": answers * (tokens - 1)}
    steps = [step] * (tokens - 1)
    return {
        "answers": made, "seconds": 0.5 + step * (tokens - 1), "steps": steps, "vllm": vllm, "isd": None,
        "resident_bytes": 10, "device_bytes": None,
    }  # fmt: skip


def isd_round(step: float = 0.2) -> dict[str, Any]:
    """Two answers at n = 3: cold, both accepted, one accepted, cold, none accepted (of one draft)."""
    made = plain_round()
    made["answers"] = [answer([1, 1, 3, 2, 1, 1], step) for _ in range(2)]
    made["steps"], made["seconds"] = [step] * 5, 0.5 + 5 * step
    made["vllm"] |= {"tokens": 18, "forwards": 10, "verify_forwards": 6, "drafts": 10, "accepted": 6}
    made["vllm"]["accepted_by_place"] = [4, 2, 0, 0]
    made["isd"] = {
        "accepted_all": 2, "rejected": 4, "cold": 4, "emitted": 16, "rows": 42, "drafted_per_position": [6, 4],
        "accepted_per_position": [4, 2], "seconds": 0.1, "steps": 5,
    }  # fmt: skip
    return made


def place(number: int, group: int = 0) -> Place:
    """Round `number` at temperature 0 and one request at a time."""
    return Place(group, 0.0, 1, number)
