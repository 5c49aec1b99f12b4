"""The answers of one method in a file, one a line, so that an interrupted evaluation goes on where it was."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_idlm.evaluate.benchmarks import EvalError
from vllm_idlm.evaluate.client import Answer


def key(body: dict[str, Any]) -> str:
    """The name of a request: a digest of all that was asked."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:24]


class Answers:
    """A growing JSON-lines file. Its first line says how the answers were made; another way is refused."""

    def __init__(self, file: Path, made: dict[str, Any]) -> None:
        self.file, self.held, self.counts, self.seconds = file, {}, {}, 0.0
        self.gaps: dict[str, float | None] = {}
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
        if lines and not lines[-1].endswith("\n"):  # cut off in the middle of a line
            lines.pop()
            file.write_text("".join(lines), encoding="utf-8")
        if not lines:
            self._add({"made": made})
        elif json.loads(lines[0])["made"] != made:
            raise EvalError(
                f"{file} holds answers made another way: {json.loads(lines[0])['made']}; asked is {made}. "
                "Fix: another --out, or remove the file"
            )
        for line in lines[1:]:
            self._take(json.loads(line))

    def _take(self, entry: dict[str, Any]) -> None:
        if "answer" in entry:
            self.held[entry["key"]] = Answer(**entry["answer"])
        elif "gap" in entry:
            self.gaps[entry["key"]] = entry["gap"]
        else:
            for name, value in entry["counters"].items():
                self.counts[name] = self.counts.get(name, 0.0) + value

    def _add(self, entry: dict[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def put(self, name: str, answer: Answer) -> None:
        """Keep an answer."""
        entry = {"key": name, "answer": asdict(answer)}
        self._add(entry)
        self._take(entry)

    def put_gap(self, name: str, gap: float | None) -> None:
        """Keep how far apart two tokens were."""
        entry = {"key": name, "gap": gap}
        self._add(entry)
        self._take(entry)

    def put_counters(self, grown: dict[str, float]) -> None:
        """Add to the counters of forwards and tokens."""
        entry = {"counters": grown}
        self._add(entry)
        self._take(entry)
