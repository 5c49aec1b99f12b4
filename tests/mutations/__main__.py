"""The command line of `python -m tests.mutations`: see the package's docstring."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.mutations import faults, results
from tests.mutations.campaign import Campaign
from tests.mutations.copies import CopyError
from tests.mutations.fault import Fault, FaultError
from tests.mutations.results import FOUND, Results

ROOT = Path(__file__).resolve().parents[2]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tests.mutations", description="Which tests find which small faults.")
    parser.add_argument("--list", action="store_true", help="say what the faults are, and run nothing")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these faults")
    parser.add_argument("--area", nargs="+", choices=sorted({f.area for f in faults.ALL}), help="faults of these areas")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs of pytest at a time (1)")
    parser.add_argument("--timeout", type=float, default=900, metavar="SECONDS", help="of one run of pytest (900)")
    parser.add_argument("--results", type=Path, metavar="FILE.json", help="keep outcomes, skip those of this source")
    parser.add_argument("--again", action="store_true", help="also run faults whose outcome is kept")
    parser.add_argument("--slow", action="store_true", help="run tests marked slow too")
    control = parser.add_mutually_exclusive_group()
    control.add_argument("--control", action="store_true", help="only run the tests without a fault")
    control.add_argument("--no-control", action="store_true", help="do not: for a quick try, it proves nothing")
    return parser


def chosen(only: Sequence[str] | None, areas: Sequence[str] | None) -> list[Fault]:
    """Return the faults of these names and areas (None: any); FaultError for a name that is none."""
    if unknown := sorted(set(only or ()) - {fault.name for fault in faults.ALL}):
        raise FaultError(f"no fault is called {', '.join(unknown)}: see --list")
    return [f for f in faults.ALL if (only is None or f.name in only) and (areas is None or f.area in areas)]


def main(given: Sequence[str] | None = None) -> int:
    """Run what the command line says. Returns 0, 1 if a fault was not found, 2 if nothing could be told."""
    asked = _parser().parse_args(given)
    try:
        mine = chosen(asked.only, asked.area)
        if asked.list:
            print("\n".join(f"{f.area:<10} {f.name:<44} {f.file}\n{'':<11}{f.says}" for f in mine))
            return 0
        for fault in mine:
            fault.mutated((ROOT / fault.file).read_text())
        return _campaign(mine, asked)
    except (FaultError, CopyError) as error:
        print(error, file=sys.stderr)
        return 2


def _campaign(mine: list[Fault], asked: argparse.Namespace) -> int:
    kept = Results(asked.results)
    with Campaign(ROOT, kept, timeout=asked.timeout, slow=asked.slow) as campaign:
        if not asked.no_control and (failed := campaign.control(mine)):
            print("These fail without a fault, so that nothing can be told:", file=sys.stderr)
            print("\n".join(f"  {failure.test}: {failure.error}" for failure in failed), file=sys.stderr)
            return 2
        if asked.control:
            return 0
        campaign.judge(mine, asked.jobs, asked.again)
    print(results.table(mine, kept.faults))
    return int(any(kept.faults[fault.name]["outcome"] not in FOUND for fault in mine))


def _end(*_: object) -> None:
    """End at a SIGTERM as at the keyboard's interrupt: runs are ended and copies removed on the way out."""
    print("ended by SIGTERM; with the same --results FILE.json the next call goes on from here", file=sys.stderr)
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)
    sys.exit(main())
