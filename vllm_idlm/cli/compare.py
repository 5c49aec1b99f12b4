"""What two runs of the demo, plain and ISD, say about each other. Plain arithmetic on `_run.Outcome`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vllm_idlm.cli._run import Outcome, parting


@dataclass(frozen=True)
class Difference:
    """The first place where two answers to a prompt part; a token is None where that answer had ended."""

    prompt: int
    index: int
    plain: str | None
    isd: str | None
    logprobs: list[float] | None = None  # the model's, of plain's token and of ISD's


def first_difference(prompt: int, plain: dict[str, Any], isd: dict[str, Any]) -> Difference | None:
    """Where the answers' token ids differ first, None if they are the same."""
    at = parting(plain["token_ids"], isd["token_ids"])
    if at is None:
        return None
    return Difference(prompt, at, *(a["pieces"][at] if at < len(a["pieces"]) else None for a in (plain, isd)))


def differences(plain: Outcome, isd: Outcome) -> list[Difference]:
    """The first difference of each prompt that has one, with the model's own margin between the two tokens."""
    pairs = enumerate(zip(plain.answers, isd.answers, strict=True))
    found = [d for i, (a, b) in pairs if (d := first_difference(i, a, b))]
    return [replace(d, logprobs=isd.margins.get(str(d.prompt))) for d in found]


def tokens(outcome: Outcome) -> int:
    """Tokens of all answers."""
    return sum(len(answer["token_ids"]) for answer in outcome.answers)


def speed(outcome: Outcome) -> float:
    """Tokens per second, prompts included."""
    return tokens(outcome) / outcome.seconds


def decode_speed(outcome: Outcome) -> float | None:
    """Tokens per second of decode steps alone; None without any."""
    return outcome.decode_tokens / outcome.decode_seconds if outcome.decode_seconds else None


def step_ms(outcome: Outcome) -> float | None:
    """Milliseconds of a decode step (one forward of the batch); None without any."""
    return 1000 * outcome.decode_seconds / outcome.decode_steps if outcome.decode_steps else None


def overhead(plain: Outcome, isd: Outcome) -> float | None:
    """OH: time of an ISD decode step over that of a plain one."""
    a, b = step_ms(plain), step_ms(isd)
    return b / a if a and b else None


def tpf(outcome: Outcome) -> float | None:
    """Tokens after each answer's first over the decode forwards that made them; 1 for plain decoding."""
    if outcome.isd is None:
        return 1.0
    after_first = sum(max(len(answer["token_ids"]) - 1, 0) for answer in outcome.answers)
    return after_first / outcome.isd["forwards"] if outcome.isd["forwards"] else None


def acceptance(isd: dict[str, Any]) -> list[float | None]:
    """Per draft position, the share accepted of the drafts there whose predecessors were all accepted."""
    drafted, accepted = isd["drafted_per_position"], isd["accepted_per_position"]
    reached = [d if j == 0 else min(d, accepted[j - 1]) for j, d in enumerate(drafted)]
    return [a / r if r else None for a, r in zip(accepted, reached, strict=True)]
