"""The prompts of a comparison: the same for every method, different in every round as far as they last."""

from __future__ import annotations

import random

from vllm_idlm.bench.config import Bench, ConfigError

Chat = list[dict[str, str]]
HELD_OUT = 0.03  # share of the recipe's prompts that the shipped adapter's training never saw


def pool(config: Bench) -> list[Chat]:
    """All prompts, in an order drawn by the seed. Raises ConfigError."""
    from vllm_idlm.data import keys, prompts
    from vllm_idlm.data.errors import DataError

    if config.prompts == "held-out":
        made = prompts.built_in("chat", 8192, 0)
        found = [list(p.messages) for p in made if keys.side(p.key, HELD_OUT) == keys.EVAL]
    else:
        try:
            found = [list(p.messages) for p in prompts.load(config.prompts)]
        except (DataError, OSError) as error:
            raise ConfigError(f"prompts: {error}") from None
    random.Random(config.seed).shuffle(found)
    return found


def rounds(config: Bench) -> dict[tuple[float, int, int], list[Chat]]:
    """Prompts by (temperature, concurrency, round); used again from the start where there are not enough."""
    found, taken, places = pool(config), 0, {}
    for temperature in config.temperatures:
        for concurrency in config.concurrency:
            for number in range(config.rounds):
                many = config.wanted(concurrency)
                places[temperature, concurrency, number] = [found[(taken + i) % len(found)] for i in range(many)]
                taken += many
    return places


def repeated(config: Bench) -> float:
    """How often a prompt is used, at the most: 1 where every request has one of its own."""
    total = sum(map(config.wanted, config.concurrency)) * config.rounds * len(config.temperatures)
    return max(total / len(pool(config)), 1.0)
