"""What the commands share: the consoles, and one way to end with an error."""

from __future__ import annotations

import logging
import os
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


def numbers(option: str, text: str, low: float, high: float) -> list[float]:
    """The numbers of a comma-separated option; ValueError, naming it, if they are none or out of bounds."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(low <= x <= high for x in found):
        raise ValueError(f"{option} {text}: give numbers from {low} to {high}, separated by commas")
    return found


def quiet() -> None:
    """Keep vLLM's log lines below errors off the screen, unless the user asked for a level; before vLLM's import."""
    if os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR") == "ERROR":
        logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)  # logs before vLLM's set-up is read
