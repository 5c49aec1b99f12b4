"""Every Triton kernel compiles for an H100, to machine code, and keeps its values in registers. No GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT


@pytest.mark.heavy
def test_kernels_compile_without_spilling():
    """In a process of its own: vLLM must see the stand-in backend when it is first imported."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.compile_kernels"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if "registers" in line]
    assert {line.split()[0].split(".")[0] for line in lines} == {"verify", "draft", "gate", "tail"}
    assert len(lines) == 34
    assert all(line.endswith(" 0 bytes of stack") for line in lines), done.stdout
