"""The prompts of a run: chats with a kind and a place, from a file or from a recipe."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import files, recipe
from .errors import DataError
from .keys import prompt_key


@dataclass(frozen=True)
class Prompt:
    """One prompt: its place among all of the run, and its chat (the last turn is not the assistant's)."""

    index: int
    messages: tuple[dict[str, str], ...]
    kind: str | None

    @property
    def key(self) -> str:
        """What identifies it: see `keys.prompt_key`."""
        return prompt_key(list(self.messages))


def built_in(name: str, count: int, seed: int) -> list[Prompt]:
    """`count` prompts of a recipe."""
    made = recipe.prompts(name, count, seed)
    return [Prompt(i, ({"role": "user", "content": text},), kind) for i, (text, kind) in enumerate(made)]


def load(file: str | Path, count: int | None = None) -> list[Prompt]:
    """The first `count` different prompts of a .txt (one a line), .jsonl or .parquet file ("prompt" or "messages").

    An optional "kind" is kept. Of a chat that ends with the assistant's turn, that turn is left out.
    """
    path = Path(file)
    different: dict[str, Prompt] = {}
    for messages, kind in _lines(path) if path.suffix == ".txt" else _rows(path):
        prompt = Prompt(len(different), messages, kind)
        different.setdefault(prompt.key, prompt)
    if not different:
        raise DataError(f"{path}: it holds no prompt; write one a line (.txt) or one JSON object a line (.jsonl)")
    return list(different.values())[:count]


def digest(file: str | Path) -> str:
    """SHA-256 of a file, in hex."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def chat(value: Any, place: str) -> tuple[dict[str, str], ...]:
    """`value` as chat messages of role and content, both text. Raises DataError naming `place`."""
    fix = 'write [{"role": "user", "content": "..."}]'
    if not isinstance(value, list) or not value:
        raise DataError(f"{place}: messages: {str(value)[:80]!r} is no list of messages; {fix}")
    for message in value:
        parts = [message.get(name) for name in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(part, str) for part in parts):
            raise DataError(f"{place}: messages: {str(message)[:80]!r} lacks a text for role or content; {fix}")
    return tuple({"role": message["role"], "content": message["content"]} for message in value)


def _lines(path: Path) -> list[tuple[tuple[dict[str, str], ...], None]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}; give a UTF-8 text file with one prompt a line") from None
    return [(({"role": "user", "content": line.strip()},), None) for line in lines if line.strip()]


def _rows(path: Path) -> list[tuple[tuple[dict[str, str], ...], str | None]]:
    found = []
    for place, row in files.rows(path):
        kind = row.get("kind")
        found.append((_asked(row, place), None if kind is None else str(kind)))
    return found


def _asked(row: dict[str, Any], place: str) -> tuple[dict[str, str], ...]:
    if row.get("messages") is not None:
        messages = chat(row["messages"], place)
        asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        if not asked:
            raise DataError(f"{place}: messages: nothing comes before the assistant's turn; add the user's")
        return asked
    text = row.get("prompt")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f'{place}: no "prompt" text and no "messages" (it has {", ".join(row) or "nothing"}); add one')
    return ({"role": "user", "content": text},)
