"""What the commands share: the consoles, and one way to end with an error."""

from __future__ import annotations

from typing import NoReturn

import typer
from rich.console import Console

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def fail(message: str, status: int = 1) -> NoReturn:
    """Print `message` (what is wrong and the fix) to stderr and end the command."""
    err.print("error:", style="bold red", end=" ")
    err.print(message, markup=False)
    raise typer.Exit(status)
