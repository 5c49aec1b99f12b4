"""Answers that come side by side are shown one after another."""

from __future__ import annotations

from vllm_idlm.cli import stream


def test_side_by_side_answers_are_shown_in_order():
    from rich.console import Console

    console = Console(record=True, width=80, file=open("/dev/null", "w"))  # noqa: SIM115
    shown = stream.Stream(["A?", "B?"], console)
    shown.begin()
    for request, text, last in [(1, "b1", False), (0, "a1", False), (1, "b2", True), (0, "a2", True)]:
        shown.take(request, 1, text, last)
    assert console.export_text().split() == [">", "A?", "a1a2", ">", "B?", "b1b2"]
