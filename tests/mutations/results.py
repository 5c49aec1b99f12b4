"""What runs found: kept in a file after each fault, so that a campaign can be cut and gone on with, and as a table."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.mutations.fault import Fault

FOUND = ("found", "hang", "died")  # "missed" is not, nor is "crash": an error before any test
_SOURCES = {".py", ".cpp", ".toml", ".html", ".json", ".yaml"}
_ASIDE = ("tests", "docs", "benchmarks")


def source_fingerprint(folder: Path) -> str:
    """Return a hash of the source in a snapshot, and of what all tests share."""
    shared = [*folder.glob("tests/**/conftest.py"), *folder.glob("tests/support/**/*.py")]
    source = [
        file
        for entry in folder.iterdir()
        if entry.name not in _ASIDE
        for file in ([entry] if entry.is_file() else entry.rglob("*"))
        if file.suffix in _SOURCES
    ]
    return _hash(f"{file.relative_to(folder)} {_hash(file.read_bytes())}" for file in sorted([*source, *shared]))


def test_fingerprint(folder: Path, source: str, test: str) -> str:
    """Return a hash of the source and of one test's file."""
    return _hash([source, test, _hash((folder / test.partition("::")[0]).read_bytes())])


def fault_fingerprint(folder: Path, source: str, fault: Fault, slow: bool) -> str:
    """Return a hash of a fault, its tests and the source."""
    tests = [test_fingerprint(folder, source, test) for test in fault.tests]
    return _hash([json.dumps(asdict(fault)), str(slow), *tests])


def _hash(parts: Iterable[str] | bytes) -> str:
    given = parts if isinstance(parts, bytes) else "\n".join(parts).encode()
    return hashlib.sha256(given).hexdigest()[:16]


class Results:
    """Records of faults and of tests without any fault, in a file or (file None) in memory alone."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        kept = json.loads(file.read_text()) if file is not None and file.exists() else {}
        self.faults: dict[str, dict[str, Any]] = kept.get("faults", {})
        self._controls: dict[str, str] = kept.get("controls", {})  # test -> fingerprint at which it passed

    def known(self, fault: Fault, fingerprint: str) -> bool:
        """Whether the file has what became of the fault in the same source."""
        return self.faults.get(fault.name, {}).get("fingerprint") == fingerprint

    def enter(self, fault: Fault, record: dict[str, Any]) -> None:
        """Keep what became of a fault."""
        self.faults[fault.name] = record
        self._write()

    def passes(self, test: str, fingerprint: str) -> bool:
        """Whether the file has a test as passing in the same source without a fault."""
        return self._controls.get(test) == fingerprint

    def enter_control(self, fingerprints: dict[str, str]) -> None:
        """Keep that tests pass without a fault."""
        self._controls |= fingerprints
        self._write()

    def _write(self) -> None:
        if self._file is None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        made = self._file.with_name(self._file.name + ".new")
        made.write_text(json.dumps({"faults": self.faults, "controls": self._controls}, indent=1) + "\n")
        os.replace(made, self._file)


def line(fault: Fault, record: dict[str, Any]) -> str:
    """Return one fault's outcome as a row of the table."""
    kind, test = record["outcome"], record.get("found_by") or ""
    what = {"found": test, "hang": "HANG: out of time", "died": f"DIED: {record['error']}"}.get(kind, kind.upper())
    return f"{fault.area:<10} {fault.name:<44} {record['seconds']:>6.0f} s  {what}"


def table(faults: Sequence[Fault], records: dict[str, dict[str, Any]]) -> str:
    """Return all outcomes, then those that no test found, with what a user would get wrong."""
    done = [fault for fault in faults if fault.name in records]
    lost = [fault for fault in done if records[fault.name]["outcome"] not in FOUND]
    told = [f"{'area':<10} {'fault':<44} {'time':>8}  found by"]
    told += [line(fault, records[fault.name]) for fault in done]
    told += [f"\n{len(done) - len(lost)} of {len(done)} faults were found."]
    for fault in lost:
        record = records[fault.name]
        why = f" ({record['error']})" if record["error"] else ""
        told.append(f"  {record['outcome'].upper()} {fault.name}: {fault.says}{why}")
    return "\n".join(told)
