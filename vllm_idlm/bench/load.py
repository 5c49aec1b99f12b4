"""One round of load: a closed loop that keeps some requests under way in a vllm.LLM, timed from outside.

The engine is stepped here, so that every token's arrival is known: an *event* is one engine step that gave a request
tokens, several where drafts were accepted. Events after a request's first are its decode forwards.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

_NUMBERS = itertools.count()  # request ids, different in all of a process


@dataclass
class Answer:
    """One request. Times in seconds from the moment it was given to the engine."""

    token_ids: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    first: int = 0  # tokens of the first event
    ttft: float = 0.0
    latency: float = 0.0
    gaps: list[float] = field(default_factory=list)  # between events
    began: float = 0.0  # on the process's clock

    def take(self, tokens: Sequence[int], now: float) -> None:
        """Tokens that one engine step gave."""
        since = now - self.began
        if not self.token_ids:
            self.ttft, self.first = since, len(tokens)
        else:
            self.gaps.append(since - self.latency)
        self.token_ids += tokens
        self.latency = since


@dataclass
class Round:
    """What a round gave."""

    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0  # from the first request to the last token
    steps: list[float] = field(default_factory=list)  # of the engine, with `concurrency` requests all in decode

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON, times rounded to the microsecond."""
        made = [asdict(answer) for answer in self.answers]
        for answer in made:
            del answer["began"]
            answer["gaps"] = [round(gap, 6) for gap in answer["gaps"]]
        steps = [round(step, 6) for step in self.steps]
        return {"answers": made, "seconds": self.seconds, "steps": steps}


def drive(
    llm: Any, prompts: Sequence[Any], options: Any, concurrency: int, on_answer: Callable[[], None] = lambda: None
) -> Round:
    """Run `prompts`, `concurrency` at a time; the next is given when one ends.

    options: SamplingParams with output_kind DELTA, the same for all.
    """
    engine, made = llm.llm_engine, Round([Answer() for _ in prompts])
    waiting, under_way = list(enumerate(prompts)), {}
    began = last = time.perf_counter()
    while waiting or under_way:
        while waiting and len(under_way) < concurrency:
            place, prompt = waiting.pop(0)
            name = f"bench-{next(_NUMBERS)}"
            under_way[name] = made.answers[place]
            under_way[name].began = time.perf_counter()
            engine.add_request(name, prompt, options)
        outputs = [o for o in engine.step() if o.outputs and o.outputs[0].token_ids]
        now = time.perf_counter()
        if len(outputs) == concurrency and all(under_way[o.request_id].token_ids for o in outputs):
            made.steps.append(now - last)
        last = now
        for output in outputs:
            answer = under_way[output.request_id]
            answer.take(output.outputs[0].token_ids, now)
            answer.prompt_tokens = len(output.prompt_token_ids or [])
            if output.finished:
                del under_way[output.request_id]
                on_answer()
    made.seconds = time.perf_counter() - began
    return made
