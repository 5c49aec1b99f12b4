"""Runs the tests of faults, each in a copy of its own, once the same tests have passed without any."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tests.mutations import copies, results
from tests.mutations.fault import Fault, groups, interpreted
from tests.mutations.results import Results
from tests.mutations.runs import Failure, Run, end_all, run


class Campaign:
    """One snapshot of a working tree, and what is run in copies of it. A context: the copies go with it."""

    def __init__(self, root: Path, kept: Results, *, timeout: float = 900, slow: bool = False) -> None:
        """root: of the repository; kept: what is known already; timeout: seconds of one run of pytest."""
        self._scratch = tempfile.TemporaryDirectory(prefix="idlm-mutations-", ignore_cleanup_errors=True)
        self._folder = Path(self._scratch.name)
        self._results, self._timeout, self._slow = kept, timeout, slow
        self.snapshot = copies.snapshot(root, self._folder / "snapshot")
        self._cache = copies.idlm_cache(self._folder / "cache")
        self._source = results.source_fingerprint(self.snapshot)

    def __enter__(self) -> Campaign:
        return self

    def __exit__(self, *_: Any) -> None:
        end_all()
        self._scratch.cleanup()

    def control(self, faults: Iterable[Fault]) -> list[Failure]:
        """Run the faults' tests without a fault, those that are not known to pass; returns what fails."""
        wanted = dict.fromkeys(test for fault in faults for test in fault.tests)
        prints = {test: results.test_fingerprint(self.snapshot, self._source, test) for test in wanted}
        new = sorted(test for test, found in prints.items() if not self._results.passes(test, found))
        failed: list[Failure] = []
        for tests in groups(sorted(new, key=interpreted)):
            print(f"control: {len(tests)} tests or files without a fault", flush=True)
            ended = self._run(tests, None, first=False, limit=len(tests) * self._timeout)
            if ended.kind == "passed":
                self._results.enter_control({test: prints[test] for test in tests})
            else:
                failed += ended.failures or [Failure(" ".join(tests), f"{ended.kind}: {ended.error}")]
        return failed

    def judge(self, faults: Sequence[Fault], jobs: int = 1, again: bool = False) -> None:
        """Run each fault's tests until one fails, and keep the outcome; again: also of faults that are known."""
        prints = {f.name: results.fault_fingerprint(self.snapshot, self._source, f, self._slow) for f in faults}
        left = [fault for fault in faults if again or not self._results.known(fault, prints[fault.name])]
        if jobs == 1:
            for fault in left:
                self._enter(fault, prints[fault.name], self._outcome(fault))
            return
        with ThreadPoolExecutor(jobs) as pool:
            try:
                started = {pool.submit(self._outcome, fault): fault for fault in left}
                for done in as_completed(started):
                    self._enter(started[done], prints[started[done].name], done.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                end_all()
                raise

    def _enter(self, fault: Fault, fingerprint: str, record: dict[str, Any]) -> None:
        record = {"area": fault.area, **record, "fingerprint": fingerprint}
        self._results.enter(fault, record)
        print(results.line(fault, record), flush=True)

    def _outcome(self, fault: Fault) -> dict[str, Any]:
        """Return what becomes of a fault: its groups of tests one after another, until one fails."""
        seconds = 0.0
        for tests in groups(fault.tests):
            ended = self._run(tests, fault, first=True, limit=self._timeout)
            seconds += ended.seconds
            if ended.kind == "failed":
                test, error = ended.failures[0]
                return {"outcome": "found", "found_by": test, "seconds": round(seconds, 1), "error": error}
            if ended.kind != "passed":
                return {"outcome": ended.kind, "found_by": None, "seconds": round(seconds, 1), "error": ended.error}
        return {"outcome": "missed", "found_by": None, "seconds": round(seconds, 1), "error": ""}

    def _run(self, tests: Sequence[str], fault: Fault | None, *, first: bool, limit: float) -> Run:
        """Run tests in a new copy, with the fault if there is one; CopyError if Python would import another."""
        with tempfile.TemporaryDirectory(dir=self._folder, ignore_cleanup_errors=True) as made:
            scratch = Path(made)
            folder = copies.copy(self.snapshot, scratch / "copy")
            if fault is not None:
                fault.apply(folder)
            env = copies.environment(folder, scratch, self._cache)
            copies.check_imports(folder, env, scratch)
            return run(folder, env, tests, scratch, timeout=limit, first=first, slow=self._slow)
