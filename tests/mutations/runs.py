"""One run of pytest in a copy: whether a test failed, which, and after how many seconds."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

_RUNNING: set[subprocess.Popen] = set()
_NONE_LEFT = 5  # pytest's exit status where all tests named are slow ones


class Failure(NamedTuple):
    """A test that failed, and the last line of its traceback."""

    test: str  # node id
    error: str


class Run(NamedTuple):
    """How a run of pytest ended."""

    kind: str  # "passed", "failed", "hang" (out of time), "died" (by a signal) or "crash" (no test was to blame)
    seconds: float
    failures: tuple[Failure, ...] = ()
    error: str = ""  # of a run that ended otherwise than by its tests


def run(
    folder: Path, env: dict[str, str], tests: Sequence[str], scratch: Path, *, timeout: float, first: bool, slow: bool
) -> Run:
    """Run tests in the copy `folder`. first: stop at the first failure; slow: tests marked slow too; scratch: a folder
    for what is written meanwhile."""
    report, output = scratch / "report.xml", scratch / "output.txt"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={scratch / 'pytest'}"]
    command += [f"--junitxml={report}", "-o", "junit_family=xunit1"]
    if first:  # without the second, a file would swallow its tests that are named in front of it
        command += ["-x", "--keep-duplicates"]
    command += [*([] if slow else ["-m", "not slow"]), *tests]
    began = time.monotonic()
    status = _status(command, folder, env, output, timeout)
    seconds = time.monotonic() - began
    if status is None:
        return Run("hang", seconds, error=f"no end within {timeout:.0f} s")
    if status < 0:
        return Run("died", seconds, error=f"ended by {signal.Signals(-status).name}")
    if status in (0, _NONE_LEFT):
        return Run("passed", seconds)
    failures = tuple(_failures(report)) if status == 1 else ()
    if failures:
        return Run("failed", seconds, failures)
    return Run("crash", seconds, error=f"pytest's exit status {status}: {_last_words(output)}")


def _status(command: list[str], folder: Path, env: dict[str, str], output: Path, timeout: float) -> int | None:
    """Exit status of a command; None if it was out of time, and ended with all that it had started."""
    with output.open("w") as sink:
        process = subprocess.Popen(
            command, cwd=folder, env=env, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
        _RUNNING.add(process)
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                end(process)
            _RUNNING.discard(process)


def end(process: subprocess.Popen) -> None:
    """End a process with everything below it, also what has a session of its own (servers that tests started)."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def end_all() -> None:
    """End every run that is still going on."""
    for process in list(_RUNNING):
        end(process)


def _failures(report: Path) -> Iterator[Failure]:
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        for kind in ("failure", "error"):
            if (found := case.find(kind)) is not None:
                yield Failure(_node(case), _line(found))
                break


def _node(case: ElementTree.Element) -> str:
    """The node id of a test: its file, the classes that it is in, its name."""
    file, inside = case.get("file", ""), case.get("classname", "")
    module = file.removesuffix(".py").replace("/", ".")
    classes = inside.removeprefix(module).strip(".").split(".") if inside.startswith(module) else []
    return "::".join([file, *filter(None, classes), case.get("name", "")])


def _line(found: ElementTree.Element) -> str:
    """The line that names the exception; the last one where it is a long story."""
    lines = [line for line in (found.get("message") or found.text or "").splitlines() if line.strip()]
    told = lines[-1] if lines and lines[0].startswith("Failed: ") else " ".join(lines[:1])
    return told.strip()[:300]


def _last_words(output: Path) -> str:
    """What pytest said of an error outside of tests, in a line."""
    lines = [line.strip() for line in output.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("E  ", "ERROR"))]
    return (errors or lines or ["nothing"])[-1][:300]
