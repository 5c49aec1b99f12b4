"""Whether the sum of the parts is right: what is counted here against what vLLM and ISD count by themselves.

Each check compares two independent counts of one method at one concurrency and temperature, all rounds together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vllm_idlm.bench import counters, figures
from vllm_idlm.bench.config import Method

FORMULA = 0.02  # how far the TPF of ISD.md's formula may be off
ENOUGH = 400  # forwards; with fewer, the first and last ones of answers weigh too much for the formula


@dataclass(frozen=True)
class Check:
    """One comparison. ok: None where it does not apply, and `note` says why."""

    name: str
    found: float | None
    wanted: float | None
    ok: bool | None
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def of(method: Method, rounds: Sequence[dict[str, Any]]) -> list[Check]:
    """All checks of a method's rounds."""
    vllm = counters.total([one["vllm"] for one in rounds])
    isd = counters.total([one["isd"] for one in rounds if one["isd"]])
    answers = [answer for one in rounds for answer in one["answers"]]
    tokens = sum(len(answer["token_ids"]) for answer in answers)
    first, count = sum(answer["first"] for answer in answers), figures.events(rounds)
    found = [
        Check("tokens in the answers = vLLM's counter", tokens, vllm["tokens"], tokens == vllm["tokens"]),
        Check("forwards seen = vLLM's counter", count, vllm["forwards"], count == vllm["forwards"]),
        _sum(tokens - first, vllm, isd, most=len(answers) * figures.places(vllm, isd)),
    ]
    if isd:
        kinds = isd["accepted_all"] + isd["rejected"] + isd["cold"]
        verify = isd["accepted_all"] + isd["rejected"]
        found.append(Check("ISD's forwards = vLLM's counter", kinds, vllm["forwards"], kinds == vllm["forwards"]))
        found.append(Check("ISD's verify forwards = vLLM's", verify, vllm["verify_forwards"],
                           verify == vllm["verify_forwards"]))  # fmt: skip
        found.append(_formula(method, figures.forwards(rounds)))
    return found


def _sum(tokens: int, vllm: dict[str, Any], isd: dict[str, Any], most: int) -> Check:
    """TPF x forwards = tokens, with TPF = 1 + accepted / forwards from vLLM's counters alone.

    A forward may verify tokens beyond the end of an answer, which are cut off: at most all its drafts, once an answer.
    """
    counted = vllm["forwards"] + vllm["accepted"]
    cut = counted - tokens
    ok = 0 <= cut <= most and (not isd or isd["emitted"] == counted)
    return Check("TPF x forwards = tokens, but those cut off at ends", counted, tokens, ok, f"{cut} cut off")


def _formula(method: Method, found: dict[str, Any]) -> Check:
    """TPF against the formula of ISD.md, from acceptance by place."""
    from vllm_idlm import planner

    name = "TPF = the formula's, from acceptance by place"
    if method.fixed_rows is None:
        return Check(name, found["TPF"], None, None, "rows vary from forward to forward: the formula has fixed ones")
    n, groups = method.fixed_rows
    given = [rate or 0.0 for rate in found["given_before"][: n - 1]]
    wanted = planner.tpf(given + [0.0] * (n - 1 - len(given)), groups)
    if found["forwards"] < ENOUGH:
        return Check(name, found["TPF"], wanted, None, f"{found['forwards']} forwards are too few to tell")
    off = wanted / found["TPF"] - 1
    return Check(name, found["TPF"], wanted, abs(off) <= FORMULA, f"{off:+.1%}")
