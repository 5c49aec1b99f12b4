"""The parent's side of `_run`: start the engine's process, hand on its events, keep what vLLM prints in a log."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_idlm.cli._run import Outcome, Run

# Quiet by default: these only silence what a user cannot act on. What the user has set stays.
QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}


class RunError(RuntimeError):
    """The engine's process failed; the message ends with the tail of its log."""


def run(
    what: Run, on_phase: Callable[[str], None], on_token: Callable[[int, int, str, bool], None], verbose: bool
) -> Outcome:
    """Run `what` in a process of its own, and end that process and its children whatever happens. Raises RunError."""
    return Outcome(**work("_run", what, on_phase, on_token, verbose))


def work(
    module: str, what: Any, on_phase: Callable[[str], None], on_token: Callable[..., None], verbose: bool
) -> dict[str, Any]:
    """What `module`, which keeps `_run`'s protocol, makes of the dataclass `what`: its result's fields. As `run`."""
    log = Path(tempfile.mkstemp(prefix="idlm-", suffix=".log")[1])
    with _process(module, what, log, verbose) as (process, events):
        for line in events:
            event = json.loads(line)
            if "phase" in event:
                on_phase(event["phase"])
            elif "token" in event:
                on_token(*event["token"])
            elif "done" in event:
                log.unlink(missing_ok=True)
                return event["done"]
            else:
                raise RunError(_told(event["failed"], log, verbose))
        raise RunError(_told(f"the engine's process ended with status {process.wait()}", log, verbose))


def _told(problem: str, log: Path, verbose: bool) -> str:
    if verbose:
        return problem
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
    return f"{problem}\nThe last lines of {log}:\n{tail}\nFix what it names, or see all of it with --verbose"


@contextlib.contextmanager
def _process(module: str, what: Any, log: Path, verbose: bool) -> Iterator[tuple[subprocess.Popen, Any]]:
    read, write = os.pipe()
    command = [sys.executable, "-m", f"vllm_idlm.cli.{module}", str(write), json.dumps(asdict(what))]
    environment = dict(os.environ) if verbose else {**QUIET, **os.environ}
    # This process is the engine's alone; one more would only take a core from it (vLLM's CPU build reserves one).
    environment.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with log.open("w") as sink:
        out = None if verbose else sink
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT if out else None,
            pass_fds=[write], env=environment, start_new_session=True,
        )  # fmt: skip
    os.close(write)
    try:
        with os.fdopen(read, encoding="utf-8") as events:
            yield process, events
    finally:
        _end(process)


def _end(process: subprocess.Popen) -> None:
    """Give the engine a moment to shut down, then end its whole process group."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=15 if sys.exc_info()[0] is None else 1)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
