"""The order of a comparison: engines of a group held together, every round run by all of them in turn.

A drifting machine so hits all methods alike, and a ratio is always within one round. Who begins moves on with every
round. A method that fails is left out from then on, with vLLM's own message, and the rest go on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from vllm_idlm.bench import prompts
from vllm_idlm.bench.child import Engine, EngineError
from vllm_idlm.bench.config import Bench, Method
from vllm_idlm.bench.report import brief
from vllm_idlm.bench.store import Place, Record, Store


class Screen(Protocol):
    """What a comparison tells while it runs."""

    def starting(self, method: str) -> None: ...
    def started(self, method: str, facts: dict[str, Any]) -> None: ...
    def failed(self, method: str, where: str, message: str) -> None: ...
    def measuring(self, method: str, what: str, answers: int, of: int) -> None: ...
    def measured(self, method: str, what: str) -> None: ...


class Comparison:
    """Measures what `store` lacks of `config`."""

    def __init__(self, config: Bench, store: Store, screen: Screen) -> None:
        self.config, self.store, self.screen = config, store, screen
        self.prompts = prompts.rounds(config)
        self.engines: dict[str, Engine] = {}

    def run(self) -> None:
        """Everything, group by group."""
        self.store.state["failures"] = {}
        for number, group in enumerate(self.config.groups()):
            try:
                self._group(number, group)
            finally:
                for engine in self.engines.values():  # all at once: each takes seconds
                    engine.dismiss()
                for engine in self.engines.values():
                    engine.close()
                self.engines.clear()
        self.store.state["finished"] = True
        self.store.save()

    def left(self) -> int:
        """Rounds of single methods that are to be measured."""
        groups = enumerate(self.config.groups())
        return sum(len(g) for n, g in groups for p in self._places(n) if self.store.lacks(p, [m.name for m in g]))

    def _places(self, group: int) -> list[Place]:
        return [Place(group, *place) for place in self.prompts]

    def _group(self, number: int, group: list[Method]) -> None:
        lacking = [m for m in group if any(self.store.lacks(p, [m.name]) for p in self._places(number))]
        self._start(lacking)
        if not self.engines:
            return
        self._start([m for m in group if m not in lacking])
        for turn, place in enumerate(self._places(number)):
            if self.store.lacks(place, list(self.engines)):
                self._round(place, turn)

    def _start(self, methods: list[Method]) -> None:
        for method in methods:
            self.screen.starting(method.name)
            engine = Engine(method.name, self._arguments(method), Path(self.config.out) / "logs" / f"{method.name}.log")
            self.engines[method.name] = engine
            try:
                self.store.state["facts"][method.name] = engine.start(60 * self.config.start_minutes)
                for concurrency in self.config.concurrency:
                    self._ask(method.name, self._warm_up(concurrency), "warm-up")
            except EngineError as error:
                self._drop(method.name, "start", error)
                continue
            self.screen.started(method.name, self.store.state["facts"][method.name])
            self.store.save()

    def _arguments(self, method: Method) -> dict[str, Any]:
        made = {"model": self.config.model, "seed": self.config.seed, **self.config.engine, **method.engine}
        return made | ({"speculative_config": method.speculative} if method.speculative else {})

    def _warm_up(self, concurrency: int) -> dict[str, Any]:
        chats = [
            [{"role": "user", "content": f"Say hello, then count from {i} on in words."}] for i in range(concurrency)
        ]
        tokens = self.config.warm_up_tokens
        heat = max(self.config.temperatures)
        return {"chats": chats, "concurrency": concurrency, "temperature": heat, "tokens": tokens, "fixed": True}

    def _round(self, place: Place, turn: int) -> None:
        """One round of every living engine; kept once all have run it."""
        names = list(self.engines)
        start = turn % len(names)
        asked = {
            "chats": self.prompts[place.temperature, place.concurrency, place.round], "temperature": place.temperature,
            "concurrency": place.concurrency, "tokens": self.config.max_tokens, "fixed": self.config.fixed_length,
        }  # fmt: skip
        what = f"{place.concurrency} at a time, temperature {place.temperature:g}, round {place.round + 1}"
        made = []
        for name in names[start:] + names[:start]:
            try:
                made.append(Record(place, name, self._ask(name, asked, what)))
            except EngineError as error:
                self._drop(name, what, error)
            self.screen.measured(name, what)
        self.store.add(made)

    def _ask(self, name: str, asked: dict[str, Any], what: str) -> dict[str, Any]:
        of = len(asked["chats"])
        seconds = 60 * self.config.round_minutes
        return self.engines[name].round(asked, seconds, lambda done: self.screen.measuring(name, what, done, of))

    def _drop(self, name: str, where: str, error: EngineError) -> None:
        engine = self.engines.pop(name)
        engine.close()
        self.store.state["failures"][name] = {"where": where, "message": error.detail}
        self.store.save()
        self.screen.failed(name, where, brief(error.detail) + f"\n(all of it: {error.log})")
