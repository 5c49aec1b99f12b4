"""Run code in a fresh Python."""

from __future__ import annotations

import subprocess
import sys


def python(code: str) -> str:
    """The last line that the code prints; AssertionError with its errors if it fails."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.strip().splitlines()[-1]
