"""Answers of one run on the screen."""

from __future__ import annotations

from rich.console import Console


class Stream:
    """Answers that arrive side by side, printed one after the other: the first unfinished one is live.

    Text that one forward gave as several tokens is green.
    """

    def __init__(self, prompts: list[str], console: Console) -> None:
        self.prompts, self.console = prompts, console
        self.live = 0
        self.waiting: dict[int, list[tuple[int, str, bool]]] = {}

    def take(self, request: int, tokens: int, text: str, last: bool) -> None:
        """Text of the `request`-th prompt: how many `tokens` one forward gave, and whether they were its last."""
        self.waiting.setdefault(request, []).append((tokens, text, last))
        while pieces := self.waiting.pop(self.live, None):
            for piece in pieces:
                self._print(*piece)

    def begin(self) -> None:
        """Show the first prompt."""
        if self.live < len(self.prompts):
            self.console.print(f"\n> {self.prompts[self.live]}", style="bold", markup=False)

    def _print(self, tokens: int, text: str, last: bool) -> None:
        style = "green" if tokens > 1 else None
        self.console.print(text, style=style, end="", markup=False, soft_wrap=True)
        if last:
            self.console.print()
            self.live += 1
            self.begin()
