"""What has been measured, on disk: one JSON line a round, so that an interrupted comparison can go on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vllm_idlm.bench.config import Bench, ConfigError


class Place(NamedTuple):
    """Where a round stands in the comparison."""

    group: int
    temperature: float
    concurrency: int
    round: int


@dataclass
class Record:
    """One method's round."""

    place: Place
    method: str
    figures: dict[str, Any]  # `worker.Worker.round`


class Store:
    """The folder of a comparison: rounds.jsonl, state.json (what was asked, engines' facts, failures), the report."""

    def __init__(self, config: Bench) -> None:
        self.config, self.folder = config, Path(config.out)
        self.rounds, self.state_file = self.folder / "rounds.jsonl", self.folder / "state.json"
        self.records: dict[tuple[Place, str], Record] = {}
        self.state: dict[str, Any] = {"asked": digest(config), "facts": {}, "failures": {}, "finished": False}

    def begin(self, resume: bool, fresh: bool) -> None:
        """Make the folder, or go on with what is there. Raises ConfigError rather than lose measured rounds."""
        self.folder.mkdir(parents=True, exist_ok=True)
        found = json.loads(self.state_file.read_text()) if self.state_file.is_file() else None
        if found and resume:
            if found["asked"] != self.state["asked"]:
                raise ConfigError(
                    f"{self.folder} was begun with another configuration; --resume goes on with the same one alone: "
                    "take the changes back, or give out=ANOTHER FOLDER, or --fresh to measure anew"
                )
            self.state = found
            self._read()
        elif found and not found["finished"] and not fresh:
            raise ConfigError(f"{self.folder} holds an unfinished comparison: --resume goes on, --fresh begins anew")
        else:
            self.rounds.write_text("")
            self.save()

    def _read(self) -> None:
        for line in self.rounds.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the line that was being written
                continue
            self._keep(Record(Place(*row["place"]), row["method"], row["figures"]))

    def _keep(self, record: Record) -> None:
        self.records[record.place, record.method] = record  # a round that was measured again counts once

    def add(self, records: list[Record]) -> None:
        """Keep a whole round: every method's."""
        with self.rounds.open("a", encoding="utf-8") as file:
            for record in records:
                row = {"place": list(record.place), "method": record.method, "figures": record.figures}
                file.write(json.dumps(row) + "\n")
                self._keep(record)

    def lacks(self, place: Place, methods: list[str]) -> list[str]:
        """Those of `methods` that have no such round."""
        return [name for name in methods if (place, name) not in self.records]

    def save(self) -> None:
        """Write the state."""
        self.state_file.write_text(json.dumps(self.state, indent=1) + "\n", encoding="utf-8")


def digest(config: Bench) -> str:
    """What was asked, as one hash; where it is written does not count."""
    asked = config.model_dump(exclude={"out", "start_minutes", "round_minutes"})
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
