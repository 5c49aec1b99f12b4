"""provenance.json: what a folder of samples was made with, and whether this run may go on with it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_idlm.cli import provenance

from . import files
from .errors import DataError
from .keys import EVAL, TRAIN
from .plan import Settings, Shard

FILE = "provenance.json"
_FLAGS = {"fingerprint": "--model (its weights)", "chat_template": "--model (its chat template)"}
_FLAGS |= {"prompts_sha256": "--prompts/--recipe (the content)"}
_NAMES = {"model", "prompts"}  # what they name is compared by its hash: the same file may be named in several ways


def begin(folder: Path, settings: Settings) -> dict[str, Any]:
    """The folder's record, written if it is new. Raises DataError if it was made with other settings."""
    file = folder / FILE
    if not file.exists():
        _check_empty(folder)
        record = {"settings": settings.as_json(), "runs": []}
        _write(folder, record)
        return record
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        before = record["settings"]
        record["runs"] = list(record["runs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} cannot be read ({error!r}); mend it, or give another folder") from None
    _compare(folder, before, settings.as_json())
    return record


def start_run(record: dict[str, Any], engine: dict[str, Any]) -> None:
    """Add a run with its versions, machine and engine; written down with its first shard."""
    run = {**provenance.collect(), "engine": engine, "shards": []}
    record["runs"].append(run)
    record |= {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "versions": run["versions"]}


def add_shard(folder: Path, record: dict[str, Any], name: str) -> None:
    """Write down that the last run made a shard, at once: the run may be cut short."""
    record["runs"][-1]["shards"].append(name)
    _write(folder, record)


def finish(folder: Path, record: dict[str, Any], shards: Iterable[Shard]) -> dict[str, Any]:
    """The counts of the folder, which are also written down."""
    counts = count(folder, shards)
    if record.get("counts") != counts:
        _write(folder, {**record, "counts": counts})
    return counts


def count(folder: Path, shards: Iterable[Shard]) -> dict[str, Any]:
    """What the finished shards hold: samples and answer tokens, in all and by split, kind, temperature and ending."""
    total: dict[str, Any] = {"samples": 0, "tokens": 0, "prompts": 0}
    groups: dict[str, Counter] = {name: Counter() for name in ("split", "kind", "temperature", "finish_reason")}
    keys = set()
    for shard in shards:
        file = folder / shard.name
        if not file.exists():
            continue
        split = EVAL if shard.name.startswith(EVAL) else TRAIN
        for _, row in files.rows(file):
            keys.add(row["prompt_key"])
            total["samples"] += 1
            total["tokens"] += len(row["answer_ids"])
            for name, counter in groups.items():
                value = split if name == "split" else row[name]
                counter["none" if value is None else str(value)] += 1
    return {**total, "prompts": len(keys), **{name: dict(sorted(counter.items())) for name, counter in groups.items()}}


def _write(folder: Path, record: dict[str, Any]) -> None:
    files.write_text(folder / FILE, json.dumps(record, indent=1) + "\n")


def _check_empty(folder: Path) -> None:
    for file in sorted(folder.glob("*")):
        if file.name.startswith((f"{TRAIN}-", f"{EVAL}-")):
            raise DataError(
                f"{folder} holds {file.name} but no {FILE}, so its settings are unknown; give another folder"
            )


def _compare(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    different = [name for name in {**before, **now} if name not in _NAMES and before.get(name) != now.get(name)]
    if different:
        said = "; ".join(
            f"{_FLAGS.get(name, '--' + name.replace('_', '-'))} was {_shown(before.get(name))}, "
            f"now {_shown(now.get(name))}"
            for name in different
        )
        raise DataError(f"{folder} was begun with other settings: {said}. Give the same ones, or another folder")


def _shown(value: Any) -> str:
    return ",".join(f"{item:g}" for item in value) if isinstance(value, list) else str(value)[:16]
