"""The command line as a whole: its help comes without heavy imports, unknown commands are refused."""

from __future__ import annotations

import subprocess
import sys

import typer
from typer.testing import CliRunner

from vllm_idlm.cli import app

RUNNER = CliRunner()


def test_help_imports_neither_torch_nor_vllm():
    code = (
        "import sys; sys.argv = ['idlm', '--help']\n"
        "from vllm_idlm.cli import app\n"
        "app(standalone_mode=False)\n"
        "assert not {'torch', 'vllm', 'transformers'} & set(sys.modules), 'heavy imports'\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert all(name in shown.stdout for name in ("demo", "serve", "chat", "models", "doctor"))


def test_unknown_commands_are_refused():
    assert RUNNER.invoke(app, ["frobnicate"]).exit_code == 2
    assert isinstance(app, typer.Typer)
