"""What a fault is, and how it is put into a copy of the source."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_INTERPRETED = "tests/interpreted/"  # these need a pytest process of their own: see the conftest.py there


class FaultError(ValueError):
    """A fault that does not fit the source: which, and why."""


@dataclass(frozen=True)
class Fault:
    """A piece of one file's text, and what stands there instead."""

    name: str  # short, in kebab-case
    area: str
    file: str  # relative to the repository
    old: str  # occurs exactly once in the file
    new: str
    says: str  # one sentence: what a user would get wrong
    tests: tuple[str, ...]  # pytest node ids or files, the likeliest and quickest first

    def mutated(self, text: str) -> str:
        """Return the file's text with the fault in it; FaultError unless `old` is there once and `new` differs."""
        if (count := text.count(self.old)) != 1:
            raise FaultError(f"{self.name}: the text to replace occurs {count} times in {self.file}, must be once")
        if self.old == self.new:
            raise FaultError(f"{self.name}: old and new text are the same")
        return text.replace(self.old, self.new)

    def apply(self, folder: Path) -> None:
        """Put the fault into the copy of the repository in `folder`."""
        file = folder / self.file
        file.write_text(self.mutated(file.read_text()))


def interpreted(test: str) -> bool:
    """Return whether a test needs the process of the interpreted ones."""
    return test.startswith(_INTERPRETED)


def groups(tests: Iterable[str]) -> list[tuple[str, ...]]:
    """Split tests into those that may share a pytest process, in their order."""
    return [tuple(part) for _, part in itertools.groupby(tests, interpreted)]
