"""The table that comes last: equal answers, the time of a forward over plain decoding's (OH), the speed-up.

    python3 summary.py RESULTS.jsonl

Greedy answers in bfloat16 part from plain decoding's at ties, as plain decoding's at one batch part from its own at
another: the floor. So each parting comes with the gap between the two tokens' log-probabilities, by plain decoding.
With VLLM_BATCH_INVARIANT=1 rows do not depend on the batch, and every answer must be the same.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TIE = 0.25  # nats: two steps of bfloat16 for log-probabilities between 16 and 32
_SAME = ("mode", "graphs", "invariant")  # what an engine shares with the plain one that it is compared with


def read(file: Path) -> list[dict[str, Any]]:
    """The results in a file of lines; none if it is not there."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def lines(results: list[dict[str, Any]]) -> list[str]:
    """The table, a line of text each."""
    engines = {r["job"]: r for r in results if "rows" in r and "args" in r}
    made = ["", "== summary =="]
    for name, one in engines.items():
        made += _engine(name, one, _plain_of(one, list(engines.values())))
    made += [str(_without(r, "at")) for r in results if r.get("job", "").startswith("train") and "state" not in r]
    made += [_smoke(r["cases"]) for r in results if "cases" in r]
    return made


def _without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k != name}


def _smoke(cases: list[dict[str, Any]]) -> str:
    bad = [c for c in cases if not c["ok"]]
    return f"smoke: {bad}" if bad else f"smoke: all {len(cases)} cases well"


def _plain_of(one: dict[str, Any], engines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Plain decoding of the same model, in the same mode."""

    def fits(other: dict[str, Any]) -> bool:
        same = all(other.get(key) == one.get(key) for key in _SAME)
        keys = ("model", "layers")
        return same and other["args"]["method"] == "plain" and all(other["args"][k] == one["args"][k] for k in keys)

    return next(filter(fits, engines), None)


def _engine(name: str, one: dict[str, Any], plain: dict[str, Any] | None) -> list[str]:
    head = f"{name}: start {one['start_s']} s, {one['attention']}, {one['graphs']}"
    if plain is one and one.get("floor"):
        floor = one["floor"]
        head += f"; floor, at batch {floor['batch']}: {_equal(floor['answers'], one)}"
    elif plain is not None and plain is not one and one.get("answers") and plain.get("answers"):
        head += f"; {_equal(one['answers'], plain)}"
    if one.get("stats"):
        found = one["stats"]
        places = found.get("accepted_per_position"), found.get("drafted_per_position")
        head += f"; TPF {found.get('tpf')}, by place {places[0]} of {places[1]}"
    return [head, *(_row(row, one, plain) for row in one["rows"])]


def _equal(answers: list[list[int]], plain: dict[str, Any]) -> str:
    """How many answers are plain decoding's, and how far apart the two tokens are where the others part."""
    found = gaps(answers, plain["answers"], plain.get("scores"))
    text = f"{len(answers) - len(found)} of {len(answers)} answers as plain"
    if not found:
        return text
    known = sorted(gap for gap in found if gap is not None)
    wide = len(found) - sum(gap <= TIE for gap in known)
    text += f", gaps where they part {known}"
    if plain.get("invariant"):
        return text + "; NOT AS IT MUST BE: rows do not depend on the batch here"
    return text + (f"; {wide} NO TIE (over {TIE})" if wide else f", all ties (at most {TIE})")


def gaps(ours: list[list[int]], plain: list[list[int]], scores: Any) -> list[float | None]:
    """Of each answer that is not plain decoding's: by how much plain preferred its own token where they part first.

    scores: of each plain answer and place {token: log-probability} of the likeliest ones, tokens as text. None for a
    token that is not among them.
    """
    found: list[float | None] = []
    for i, (mine, theirs) in enumerate(zip(ours, plain, strict=True)):
        place = next((j for j, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
        if place is not None:
            top = scores[i][place] if scores else {}
            pair = [top.get(str(token)) for token in (theirs[place], mine[place])]
            found.append(None if None in pair else round(pair[0] - pair[1], 4))
        elif len(mine) != len(theirs):
            found.append(None)
    return found


def _row(row: dict[str, Any], one: dict[str, Any], plain: dict[str, Any] | None) -> str:
    """One batch size of an engine."""
    text = f"    batch {row['batch']}: {row['ms_per_forward']:.2f} ms a forward"
    text += f" ({row['step_ms_mean']:.2f} by single steps), TPF {row['tpf']:.2f}, {row['tokens_per_s']:.0f} tokens/s"
    base = next((b for b in (plain or one)["rows"] if b["batch"] == row["batch"]), None)
    if plain is not None and plain is not one and base:
        overhead = row["ms_per_forward"] / base["ms_per_forward"]
        text += f"; OH {overhead:.3f}, speed-up {row['tokens_per_s'] / base['tokens_per_s']:.2f}"
    return text + (f", host {row['host_ms']:.2f} ms" if row.get("host_ms") else "")


if __name__ == "__main__":
    print("\n".join(lines(read(Path(sys.argv[1])))))
