"""The built-in prompts: templates and lists of a YAML file in `configs/data/`, combined by a seeded draw."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import yaml

from .errors import DataError

_SLOT = re.compile(r"\{([a-z_]+)(?:\(([a-z_]+)\))?(?:\.(\d+))?(?::(\d+)-(\d+))?\}")
_MOST = 4000  # combinations drawn from one template, so that a large one does not have to be enumerated


def names() -> list[str]:
    """The built-in recipes, sorted."""
    return sorted(file.name[:-5] for file in _folder().iterdir() if file.name.endswith(".yaml"))


def digest(name: str) -> str:
    """SHA-256 of the recipe's file, in hex. Raises DataError for an unknown name."""
    return hashlib.sha256(_text(name).encode()).hexdigest()


def prompts(name: str, count: int, seed: int = 0) -> list[tuple[str, str]]:
    """`count` different prompts as (text, kind), the kinds in turn; the first m of them are those of `count` = m.

    A kind that has no more is left out of the turns. Raises DataError if the recipe has fewer than `count`.
    """
    found = list(itertools.islice(_turns(_load(name), seed), count))
    if len(found) < count:
        raise DataError(f"--count {count}: recipe {name!r} has {len(found)} different prompts; give at most that many")
    return found


def _turns(content: dict[str, Any], seed: int) -> Iterator[tuple[str, str]]:
    """Prompts of all kinds in turn, each once."""
    streams = {kind: _kind(kind, content, seed) for kind in content["kinds"]}
    seen: set[str] = set()
    while streams:
        for kind, stream in list(streams.items()):
            text = next((text for text in stream if text not in seen), None)
            if text is None:
                del streams[kind]
                continue
            seen.add(text)
            yield text, kind


def _kind(kind: str, content: dict[str, Any], seed: int) -> Iterator[str]:
    """Prompts of one kind, its templates in turn, in an order of their own each round."""
    rng = random.Random(f"{seed}/{kind}")
    left = {template: _combinations(template, content["slots"], seed) for template in content["kinds"][kind]}
    while left:
        for template in rng.sample(list(left), len(left)):
            text = next(left[template], None)
            if text is None:
                del left[template]
            else:
                yield text


def _combinations(template: str, lists: dict[str, list[str]], seed: int) -> Iterator[str]:
    """The texts of one template, its slots filled in a random order without repetition."""
    slots = list({match.group(0): match for match in _SLOT.finditer(template)}.values())
    choices = [_values(match, lists, template) for match in slots]
    size = math.prod(len(values) for values in choices)
    for place in random.Random(f"{seed}/{template}").sample(range(size), min(size, _MOST)):
        filled, taken = {}, set()
        for match, values in zip(slots, choices, strict=True):
            place, index = divmod(place, len(values))
            filled[match.group(0)] = values[index]
            taken.add((match.group(1), values[index]))
        if len(taken) == len(slots):  # not "Compare tea and tea"
            text = _SLOT.sub(lambda match: filled[match.group(0)], template)  # noqa: B023 (used at once)
            yield text[0].upper() + text[1:]


def _values(match: re.Match, lists: dict[str, list[str]], template: str) -> list[str]:
    """What may stand in a slot."""
    name, argument, _, low, high = match.groups()
    if low is not None:
        return [str(number) for number in range(int(low), int(high) + 1)]
    for asked in (name, argument):
        if asked is not None and not lists.get(asked):
            raise DataError(f"recipe template {template!r}: {match.group(0)} names no list; add {asked!r} to `slots`")
    values = [str(value) for value in lists[name]]
    if argument is None:
        return values
    return [value.replace("{}", str(inner)) for value in values for inner in lists[argument]]


def _folder() -> Any:
    return files("vllm_idlm.configs") / "data"


def _text(name: str) -> str:
    if name not in names():
        raise DataError(f"--recipe {name}: no such recipe; allowed are {', '.join(names())}")
    return (_folder() / f"{name}.yaml").read_text(encoding="utf-8")


def _load(name: str) -> dict[str, Any]:
    return yaml.safe_load(_text(name))
