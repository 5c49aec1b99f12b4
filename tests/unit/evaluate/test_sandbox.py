"""The sandbox that answers run in: what a program cannot do there."""

from __future__ import annotations

import pytest

from tests.support.needs import needs_sandbox
from vllm_idlm.evaluate import sandbox


@needs_sandbox
@pytest.mark.parametrize(
    "program",
    [
        "import socket; socket.create_connection(('127.0.0.1', 22), 2)",
        "import socket; socket.socket(socket.AF_UNIX)",
        "import os; os.fork()",
        "import threading; threading.Thread(target=print).start()",
        "x = bytearray(2 << 30)",
        "open('big', 'wb').write(bytes(4 << 20))",
        "raise SystemExit(3)",
    ],
)
def test_what_a_program_cannot_do(program):
    assert not sandbox.run(program).ok


@needs_sandbox
def test_a_program_that_does_not_end_is_ended():
    assert sandbox.run("while True: pass", seconds=1).why == "timed out"
    assert sandbox.run("import time; time.sleep(60)", seconds=1).why == "timed out"


@needs_sandbox
def test_a_program_sees_its_input_and_no_environment(monkeypatch):
    monkeypatch.setenv("A_SECRET", "x")
    done = sandbox.run("import os; print(input(), 'A_SECRET' in os.environ)", given="hello\n")
    assert (done.ok, done.out) == (True, "hello False\n")
