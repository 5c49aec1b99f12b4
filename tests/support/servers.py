"""Real servers in processes of their own, ended with everything they started."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(
    command: list[str], log: Path, path: str = "/health", seconds: float = 600, **environment: str
) -> Iterator[tuple[subprocess.Popen, httpx.Client]]:
    """The process of `command` with a free --port, and a client of it, once `path` answers 200."""
    port = free_port()
    command = [*command, "--host", "127.0.0.1", "--port", str(port)]
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_NO_USAGE_STATS": "1", **environment}
    with log.open("w") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True, env=env)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
            wait(client, path, process, log, seconds)
            yield process, client
    finally:
        end(process)


def wait(client: httpx.Client, path: str, process: Any, log: Path, seconds: float) -> None:
    """Until `path` answers 200; pytest.fail with the log's end if the process ends or the time is up."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if client.get(path).status_code == 200:
                return
        time.sleep(1)
    pytest.fail("the server did not start:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-40:]))


def end(process: subprocess.Popen) -> None:
    """SIGTERM, then SIGKILL for whatever is left of its process tree (Ray's daemons leave the process group)."""
    tree = family(process.pid)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
    for one in tree:
        with contextlib.suppress(psutil.Error):
            one.kill()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def family(pid: int) -> list[psutil.Process]:
    """A process and everything below it."""
    try:
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    except psutil.Error:
        return []


def one_called(pid: int, *words: str) -> psutil.Process:
    """The first process below `pid` whose command line has one of `words`."""
    seen = []
    for process in family(pid):
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            seen.append(line[:120])
            if any(word in line for word in words):
                return process
    pytest.fail(f"no process called {words} among:\n" + "\n".join(seen))
