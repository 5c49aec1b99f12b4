"""Runs jobs one after another on the GPU, each with its own limit; the next one imports while the last one works.

    python3 jobs.py PLAN.json --seconds 560

A plan is a list of {"name", "limit" (seconds), "command"} and, where wanted, "after" (left out unless that job went
well), "unless" (left out if that job went well), "least" (seconds that must be left to start it) and "env". A job calls
`gate` once all is imported and before it touches the GPU, and `result` for what it found: a line of $OUT/results.jsonl
each, written at once. What a job prints is in $OUT/logs.txt when it ends, by itself or at its limit. `summary` prints
the table that comes last.

Importing this module makes the project importable (`benchmarks`, `tests`). Standard library alone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPO = Path(os.environ.get("GPUKIT_REPO", Path(__file__).resolve().parents[2]))  # also from .gpukit/kit
TMP = Path(os.environ.get("GPUKIT_TMP", "/tmp"))
OUT = Path(os.environ.get("OUT", TMP / "out"))
ALL = TMP / "gpukit-results.jsonl"  # outlives a call: $OUT is emptied before the next one
LOG_BYTES = 1_500_000  # of a job, its end

if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))


def gate() -> None:
    """Wait until it is this job's turn on the GPU."""
    path = os.environ.get("GPUKIT_GATE")
    while path and not os.path.exists(path):
        time.sleep(0.02)


def result(values: dict[str, Any]) -> None:
    """Write down what was found: a line of $OUT/results.jsonl, and of the file of all calls."""
    line = json.dumps({"at": round(time.time()), **values}) + "\n"
    for path in (OUT / "results.jsonl", ALL):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(line)


def leave() -> None:
    """End the process at once: vLLM's own way out takes seconds, and may hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class Run:
    """One run of a plan: the processes of its jobs, and how each job went ("ok", or what was wrong)."""

    def __init__(self, plan: list[dict[str, Any]], seconds: float, ahead: int = 1) -> None:
        """seconds: for all jobs together; ahead: jobs that import before it is their turn."""
        self.plan, self.ahead, self.began = plan, ahead, time.time()
        self.end = self.began + seconds
        self.state: dict[str, str] = {}
        self._gates, self._logs = TMP / "gpukit-gates", TMP / "gpukit-logs"
        self._started: dict[int, subprocess.Popen] = {}
        for folder in (self._gates, self._logs, OUT):
            folder.mkdir(parents=True, exist_ok=True)

    def all(self) -> None:
        """Run what can be run."""
        for i, job in enumerate(self.plan):
            why = self._obstacle(job)
            if why:
                self.state[job["name"]] = "left out"
                result({"job": job["name"], "state": f"left out: {why}"})
                self._stop(i)
            else:
                self._one(i)
        for i in self._started:
            self._stop(i)

    def _obstacle(self, job: dict[str, Any]) -> str | None:
        """Why a job is left out, or None."""
        needs, spare, left = job.get("after"), job.get("unless"), self.end - time.time()
        if needs and self.state.get(needs) != "ok":
            return f"needs {needs}"
        if spare and self.state.get(spare) == "ok":
            return f"{spare} went well"
        if left < job.get("least", min(job["limit"], 25)):
            return f"{left:.0f} s left"
        return None

    def _gate_of(self, job: dict[str, Any]) -> Path:
        return self._gates / f"{job['name']}-{os.getpid()}"

    def _start(self, i: int) -> None:
        if i in self._started:
            return
        job = self.plan[i]
        own = {"GPUKIT_GATE": str(self._gate_of(job)), "GPUKIT_JOB": job["name"]}
        with (self._logs / f"{job['name']}.log").open("w") as log:
            self._started[i] = subprocess.Popen(
                job["command"],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **job.get("env", {}), **own},
                start_new_session=True,
            )

    def _stop(self, i: int) -> None:
        """End a job that still runs, with whatever it started (its own group of processes)."""
        process = self._started.get(i)
        if process is None or process.poll() is not None:
            return
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, sign)
                process.wait(5)
                break
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue

    def _one(self, i: int) -> None:
        """Let one job work, and the next ones import meanwhile."""
        job = self.plan[i]
        self._start(i)
        for j in range(i + 1, min(len(self.plan), i + 1 + self.ahead)):
            if not self.plan[j].get("unless"):
                self._start(j)
        began = time.time()
        self._gate_of(job).touch()
        try:
            code = self._started[i].wait(min(job["limit"], self.end - began))
            state = "ok" if code == 0 else f"exit {code}"
        except subprocess.TimeoutExpired:
            state = "over its limit"
            self._stop(i)
        self._note(job, state, time.time() - began)

    def _note(self, job: dict[str, Any], state: str, took: float) -> None:
        name = job["name"]
        self.state[name] = state
        text = (self._logs / f"{name}.log").read_text(errors="replace")
        with (OUT / "logs.txt").open("a") as file:
            file.write(f"\n===== {name}: {state}, {took:.0f} s =====\n{text[-LOG_BYTES:]}\n")
        result({"job": name, "state": state, "seconds": round(took, 1)})
        print(f"[{time.time() - self.began:4.0f} s] {name}: {state} in {took:.0f} s", flush=True)
        if state != "ok":
            print("    " + "\n    ".join(text.strip().splitlines()[-8:]), flush=True)


def main() -> None:
    """Run a plan, then print the table of all calls so far."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--seconds", type=float, default=560)
    parser.add_argument("--ahead", type=int, default=1, help="jobs that import ahead of their turn")
    args = parser.parse_args()
    Run(json.loads(args.plan.read_text()), args.seconds, args.ahead).all()
    import summary

    try:
        print("\n".join(summary.lines(summary.read(ALL))))
    except Exception as error:  # what was found is in the files in any case
        print("no summary:", repr(error))


if __name__ == "__main__":
    main()
