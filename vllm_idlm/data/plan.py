"""What a run is to make: its settings, its shards, and how each sample is drawn, all decided before it starts."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from . import files
from .errors import DataError
from .keys import EVAL, TRAIN, side
from .prompts import Prompt

MOST_ANSWERS = 1000


@dataclass(frozen=True)
class Settings:
    """Everything that decides what the samples are; two runs with the same settings make the same data."""

    model: str  # as the user named it
    fingerprint: str  # of its weights
    dtype: str
    chat_template: str | None  # SHA-256
    prompts: str  # file or recipe, as the user named it
    prompts_sha256: str
    count: int | None
    temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)
    answers: int = 1  # per prompt
    max_tokens: int = 256
    held_out: float = 0.05
    shard: int = 512  # prompts
    format: str = "jsonl"
    seed: int = 0
    top_p: float = field(default=1.0, init=False)

    def as_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "temperatures": list(self.temperatures)}


@dataclass(frozen=True)
class Draw:
    """How one sample is drawn."""

    prompt: Prompt
    answer_index: int
    temperature: float
    seed: int  # of its own, so that neither its neighbours nor a restart change it


@dataclass(frozen=True)
class Shard:
    """The prompts of one file."""

    name: str
    prompts: tuple[Prompt, ...]


def check(settings: Settings) -> None:
    """Raise DataError for a setting that cannot be: before anything is loaded."""
    temperatures = settings.temperatures
    if not temperatures or any(not 0 <= value <= 100 for value in temperatures):
        raise DataError(f"--temperatures {_plain(temperatures)}: numbers from 0 on, separated by commas: 0,0.7,1.0")
    if settings.answers > 1 and not any(temperatures):
        raise DataError(
            f"--answers {settings.answers} with --temperatures {_plain(temperatures)}: every answer of a prompt would "
            "be the same; give a temperature above 0 too, or --answers 1"
        )
    _between("--answers", settings.answers, 1, MOST_ANSWERS)
    _between("--max-tokens", settings.max_tokens, 1, None)
    _between("--shard", settings.shard, 1, None)
    if not 0 <= settings.held_out < 1:
        raise DataError(f"--held-out {settings.held_out}: a share of the prompts; allowed is 0 up to, not with, 1")
    if settings.format not in files.FORMATS:
        raise DataError(f"--format {settings.format}: allowed are {', '.join(files.FORMATS)}")
    if settings.format == "parquet":
        files.pyarrow()


def shards(prompts: list[Prompt], settings: Settings) -> list[Shard]:
    """The shards of a run, the held-out side first: it is the smaller, and is there when a run is cut short."""
    made = []
    for name in (EVAL, TRAIN):
        chosen = [prompt for prompt in prompts if side(prompt.key, settings.held_out) == name]
        for number, first in enumerate(range(0, len(chosen), settings.shard)):
            group = tuple(chosen[first : first + settings.shard])
            made.append(Shard(f"{name}-{number:05d}.{settings.format}", group))
    return made


def draws(prompt: Prompt, settings: Settings) -> list[Draw]:
    """The samples of one prompt: the temperatures in turn from a seeded start, greedy at most once."""
    start = derived(settings.seed, "temperature", prompt.index) % len(settings.temperatures)
    values = _in_turn(settings.temperatures, start)
    return [
        Draw(prompt, i, temperature, derived(settings.seed, prompt.index, i))
        for i, temperature in enumerate(itertools.islice(values, settings.answers))
    ]


def derived(*parts: Any) -> int:
    """A number of 31 bits that hangs on `parts` alone."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "big") >> 1


def _in_turn(values: tuple[float, ...], start: int) -> Iterator[float]:
    greedy = False
    for value in itertools.cycle(values[start:] + values[:start]):
        if value > 0 or not greedy:
            yield value
        greedy |= value == 0


def _between(name: str, value: int, low: int, high: int | None) -> None:
    if value < low or (high is not None and value > high):
        raise DataError(f"{name} {value}: allowed is {low}{' and up' if high is None else f' to {high}'}")


def _plain(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)
