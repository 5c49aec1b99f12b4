"""Programs that a model wrote, run in a process without network, with limits on time and memory.

This keeps a clumsy program from doing harm: no network, no processes, little memory, and no writing outside its own
temporary folder (Landlock, Linux 5.13; and as the user nobody if we are root). It is no defence against an attacker:
evaluate models that you do not trust in a container.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from vllm_idlm.evaluate._confined import NOT_CONFINED
from vllm_idlm.evaluate.benchmarks import EvalError

SECONDS = 10.0
MEMORY = 1 << 30  # bytes


@dataclass(frozen=True)
class Outcome:
    """What a program did."""

    ok: bool  # ended by itself with status 0
    out: str  # its standard output, at most 1 MB of it
    why: str  # "" or "timed out", or the last line of its standard error


def run(program: str, given: str = "", seconds: float = SECONDS, memory: int = MEMORY) -> Outcome:
    """Run a Python program (standard library only) with `given` as its input.

    seconds: wall-clock time; memory: bytes of address space. Raises EvalError where it cannot be confined.
    """
    with tempfile.TemporaryDirectory(prefix="idlm-") as folder:
        os.chmod(folder, 0o777)  # the program may run as nobody
        file = Path(folder) / "program.py"
        file.write_text(program, encoding="utf-8")
        return _outcome(*_execute(file, given, seconds, memory))


def _execute(file: Path, given: str, seconds: float, memory: int) -> tuple[int | None, bytes, bytes]:
    """Exit status (None: out of time), output, errors."""
    launcher = str(Path(__file__).with_name("_confined.py"))
    command = [sys.executable, "-I", "-S", "-B", launcher, str(file), str(memory), str(int(seconds) + 1)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=file.parent,
        env={"PATH": os.defpath, "PYTHONHASHSEED": "0"}, start_new_session=True,
    )  # fmt: skip
    try:
        out, errors = process.communicate(given.encode(), timeout=seconds)
        return process.returncode, out, errors
    except subprocess.TimeoutExpired:
        return None, b"", b""
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _outcome(status: int | None, out: bytes, errors: bytes) -> Outcome:
    if status is None:
        return Outcome(False, "", "timed out")
    if status == NOT_CONFINED:
        raise EvalError(
            "answers that are programs cannot be run here: the system allows neither a network namespace nor a seccomp "
            "filter. Fix: run as root, allow unprivileged user namespaces, or leave the benchmarks of code out"
        )
    told = errors.decode(errors="replace").strip().splitlines()
    return Outcome(
        status == 0, out[: 1 << 20].decode(errors="replace"), "" if status == 0 else (told or ["killed"])[-1]
    )
