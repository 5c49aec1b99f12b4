"""A vLLM server of our own for one method, ended when it is not needed any more."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_idlm.cli.child import QUIET
from vllm_idlm.evaluate.benchmarks import EvalError

_START_SECONDS = 1800


@dataclass(frozen=True)
class Method:
    """How answers are decoded: `speculation` is a speculative_config, None for plain decoding; url: who does it."""

    name: str
    speculation: dict[str, Any] | None = None
    url: str | None = None

    @property
    def plain(self) -> bool:
        """Whether it is the reference."""
        return self.name == "plain"


def method(name: str) -> Method:
    """A method by its name: plain, isd or risd, with stride and coverage if they matter (risd:8:all). EvalError.

    isd drafts with the served weights themselves, risd with the zoo's adapter. Coverage is "last" unless given: under
    "auto" a busy machine may settle on plain decoding, and then nothing would be compared.
    """
    kind, _, rest = name.partition(":")
    stride, _, coverage = rest.partition(":")
    if name == "plain":
        return Method(name)
    if kind not in ("isd", "risd") or (stride and not stride.isdigit()):
        raise EvalError(f"method {name!r}: allowed are plain, isd and risd, with a stride and a coverage (risd:4:all)")
    config: dict[str, Any] = {"method": "isd", "n": int(stride or 4), "coverage": coverage or "last"}
    if kind == "isd":
        config["lora"] = None
    return Method(name, config)


@contextlib.contextmanager
def serve(model: str, how: Method, flags: list[str]) -> Iterator[str]:
    """A running server's base address. flags: of `vllm serve`. Raises EvalError with the end of its log."""
    port = _free_port()
    log = Path(tempfile.mkstemp(prefix="idlm-eval-", suffix=".log")[1])
    spec = ["--plain"] if how.speculation is None else ["--speculative-config", json.dumps(how.speculation)]
    address = ["--host", "127.0.0.1", "--port", str(port)]
    command = [sys.executable, "-m", "vllm_idlm.cli", "serve", model, *spec, *flags, *address]
    with log.open("w") as sink:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True,
            env={**QUIET, **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        )  # fmt: skip
    try:
        _wait(process, f"http://127.0.0.1:{port}/health", log, how.name)
        yield f"http://127.0.0.1:{port}/v1"
        log.unlink(missing_ok=True)
    finally:
        _end(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(process: subprocess.Popen, url: str, log: Path, name: str) -> None:
    import httpx

    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
    raise EvalError(f"the server of {name!r} did not start. The last lines of {log}:\n{tail}")


def _end(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=20)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
