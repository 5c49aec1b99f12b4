"""The parent's side of `worker`: an engine in a process of its own, asked for rounds, ended whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_idlm.cli.child import QUIET

TAIL = 12  # lines of the log that an error shows


class EngineError(RuntimeError):
    """The engine did not start, or did not finish a round. `detail`: its own message; the log has the rest."""

    def __init__(self, detail: str, log: Path) -> None:
        super().__init__(f"{detail}\n(all of it: {log})")
        self.detail, self.log = detail, log


class Engine:
    """One engine. Started by `start`, which waits until it can be asked; usable as a context manager."""

    def __init__(self, name: str, engine: dict[str, Any], log: Path) -> None:
        self.name, self.engine, self.log = name, engine, log
        self.process: subprocess.Popen | None = None
        self.events: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def start(self, seconds: float) -> dict[str, Any]:
        """Start it; the facts it reports. Raises EngineError."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        read, write = os.pipe()
        spec = json.dumps({"engine": self.engine})
        with self.log.open("w") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vllm_idlm.bench.worker", str(write), spec], stdin=subprocess.PIPE, stdout=sink,
                stderr=subprocess.STDOUT, pass_fds=[write], env=environment(), start_new_session=True, text=True,
            )  # fmt: skip
        os.close(write)
        threading.Thread(target=self._listen, args=(read,), daemon=True).start()
        return self._wait("ready", seconds, lambda done: None)

    def round(self, asked: dict[str, Any], seconds: float, on_answer: Callable[[int], None]) -> dict[str, Any]:
        """Ask for a round and wait for it. Raises EngineError."""
        try:
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it has ended: what it said, or its log, says why
        return self._wait("round", seconds, on_answer)

    def dismiss(self) -> None:
        """Tell it to shut down, without waiting."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def close(self) -> None:
        """Let it shut down, then end its process group."""
        if self.process is None:
            return
        self.dismiss()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=15)
        self.kill()

    def kill(self) -> None:
        """End its process group now."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _listen(self, descriptor: int) -> None:
        with os.fdopen(descriptor, encoding="utf-8") as lines:
            for line in lines:
                self.events.put(json.loads(line))
        self.events.put(None)

    def _wait(self, name: str, seconds: float, on_answer: Callable[[int], None]) -> dict[str, Any]:
        until = time.monotonic() + seconds
        while True:
            try:
                event = self.events.get(timeout=max(until - time.monotonic(), 0.01))
            except queue.Empty:
                self.kill()
                raise EngineError(f"nothing after {seconds:.0f} s (the time allowed); it was ended", self.log) from None
            if event is None:
                status = self.process.wait()
                raise EngineError(f"its process ended with status {status}:\n{self._tail()}", self.log)
            if "failed" in event:
                raise EngineError(event["failed"], self.log)
            if name in event:
                return event[name]
            on_answer(event.get("answers", 0))

    def _tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-TAIL:])


def environment() -> dict[str, str]:
    """The child's: quieter, unless the user asked for a level; warnings stay in the log."""
    return {**QUIET, "VLLM_LOGGING_LEVEL": "WARNING", **os.environ}
