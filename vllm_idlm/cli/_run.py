"""One engine of `idlm demo`, in a process of its own: reads what to run, writes what happens as JSON lines.

    python -m vllm_idlm.cli._run FD SPEC      # FD: an open file descriptor for the events; SPEC: JSON, see `Run`

Events: {"phase": words} | {"token": [request, tokens, text, last]} | {"done": Outcome} | {"failed": words}. Whatever
vLLM itself prints goes to stdout and stderr, which the parent keeps in a log.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

WARM_UP = "Say hello, then count from one to thirty in words."
WARM_UP_TOKENS = 48


@dataclass
class Run:
    """What one engine is to do."""

    engine: dict[str, Any]  # keyword arguments of vllm.LLM; a speculative_config in it makes it the ISD engine
    prompts: list[str]
    tokens: int
    temperature: float
    batch: int
    reference: list[list[int]] | None = None  # token ids of another run's answers, to weigh where ours part from them


@dataclass
class Outcome:
    """What it did. Times in seconds; a decode step is an engine step after every running request's first token."""

    answers: list[dict[str, Any]] = field(default_factory=list)  # text, token_ids, prompt_tokens, finish_reason
    seconds: float = 0.0  # from the first request to the last token, prompts included, warm-up not
    decode_seconds: float = 0.0
    decode_tokens: int = 0  # of decode steps
    decode_steps: int = 0
    start_seconds: float = 0.0  # engine and warm-up
    isd: dict[str, Any] | None = None  # `isd_stats` of the measured part
    settings: dict[str, Any] | None = None  # of ISD, complete
    margins: dict[str, list[float]] = field(default_factory=dict)  # prompt -> log-probabilities: reference, ours


def parting(a: list[int], b: list[int]) -> int | None:
    """The first index where two lists of token ids differ, None if they are the same."""
    if a == b:
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def margin(llm: Any, prompt: list[int], reference: list[int], ours: list[int]) -> list[float] | None:
    """The model's log-probabilities of the two tokens where the answers part; None if an answer ended there, or if one
    of the tokens is not among the 20 most probable."""
    at = parting(reference, ours)
    if at is None or at >= min(len(reference), len(ours)):
        return None
    from vllm import SamplingParams

    options = SamplingParams(temperature=0, max_tokens=1, logprobs=20)
    asked = {"prompt_token_ids": [*prompt, *reference[:at]]}
    (found,) = llm.generate([asked], options, use_tqdm=False)[0].outputs[0].logprobs
    both = [found.get(reference[at]), found.get(ours[at])]
    return None if None in both else [entry.logprob for entry in both]


class Engine:
    """A vllm.LLM driven step by step, so that tokens can be shown as they come."""

    def __init__(self, run: Run, emit: Callable[[dict[str, Any]], None]) -> None:
        from vllm import LLM

        self.run, self.emit = run, emit
        self.llm = LLM(**run.engine)
        self.core = self.llm.llm_engine
        self.tokenizer = self.llm.get_tokenizer()
        self.added = 0

    def _prompt(self, text: str) -> Any:
        if getattr(self.tokenizer, "chat_template", None) is None:
            return text
        chat = [{"role": "user", "content": text}]
        ids = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        return {"prompt_token_ids": list(ids)}

    def ids(self, prompt: str) -> list[int]:
        """Token ids of a prompt, in the model's chat format if it has one."""
        given = self._prompt(prompt)
        return given["prompt_token_ids"] if isinstance(given, dict) else self.tokenizer.encode(given)

    def generate(self, prompts: list[str], tokens: int, outcome: Outcome, shown: int | None = None) -> None:
        """Run `prompts` as one batch into `outcome`; `shown` is the number of its first request on the screen."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        options = SamplingParams(
            temperature=self.run.temperature, max_tokens=tokens, seed=0 if self.run.temperature else None,
            output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        answers = [{"text": "", "token_ids": []} for _ in prompts]
        place = {f"demo-{self.added + i}": i for i in range(len(prompts))}
        self.added += len(prompts)
        given = [self._prompt(prompt) for prompt in prompts]
        began = last = time.perf_counter()
        for name, prompt in zip(place, given, strict=True):
            self.core.add_request(name, prompt, options)
        while self.core.has_unfinished_requests():
            outputs = self.core.step()
            now = time.perf_counter()
            if outputs:
                self._count(outputs, [answers[place[o.request_id]] for o in outputs], now - last, outcome)
                last = now
            for output in outputs:
                self._take(output, answers[place[output.request_id]])
                if shown is not None:
                    made = output.outputs[0]
                    number = shown + place[output.request_id]
                    self.emit({"token": [number, len(made.token_ids), made.text, output.finished]})
        outcome.seconds += time.perf_counter() - began
        outcome.answers += answers

    def _count(self, outputs: list[Any], answers: list[dict], seconds: float, outcome: Outcome) -> None:
        """Add a step to the decode figures, if every request in it already had a token."""
        if all(answer["token_ids"] for answer in answers):
            outcome.decode_seconds += seconds
            outcome.decode_steps += 1
            outcome.decode_tokens += sum(len(o.outputs[0].token_ids) for o in outputs)

    def _take(self, output: Any, answer: dict[str, Any]) -> None:
        made = output.outputs[0]
        answer["text"] += made.text
        answer["token_ids"] += list(made.token_ids)
        answer["prompt_tokens"] = len(output.prompt_token_ids or [])
        if made.finish_reason:
            answer["finish_reason"] = made.finish_reason

    def margin(self, prompt: str, reference: list[int], ours: list[int]) -> list[float] | None:
        """The model's log-probabilities of the two tokens where the answers part; None if an answer ended there."""
        return margin(self.llm, self.ids(prompt), reference, ours)

    def pieces(self, token_ids: list[int]) -> list[str]:
        """The text of each token by itself."""
        return [self.tokenizer.decode([t]) for t in token_ids]


def execute(run: Run, emit: Callable[[dict[str, Any]], None]) -> Outcome:
    """Start the engine, warm it up, run the prompts."""
    began = time.perf_counter()
    emit({"phase": "loading the model, compiling (a first start takes longer)"})
    engine = Engine(run, emit)
    emit({"phase": "warming up"})
    engine.generate([WARM_UP] * run.batch, WARM_UP_TOKENS, Outcome())
    outcome = Outcome(start_seconds=time.perf_counter() - began)
    isd = run.engine.get("speculative_config") is not None
    if isd:
        engine.llm.collective_rpc("isd_stats", args=(True,))
        outcome.settings = _settings(engine)
    emit({"phase": "decoding"})
    for first in range(0, len(run.prompts), run.batch):
        engine.generate(run.prompts[first : first + run.batch], run.tokens, outcome, shown=first)
    if isd:
        found = [s for s in engine.llm.collective_rpc("isd_stats", args=(True,)) if s is not None]
        outcome.isd = found[0]
    outcome.margins = _margins(engine, outcome)
    for answer in outcome.answers:
        answer["pieces"] = engine.pieces(answer["token_ids"])
    emit({"phase": "shutting the engine down"})
    engine.core.engine_core.shutdown()
    return outcome


def _margins(engine: Engine, outcome: Outcome) -> dict[str, list[float]]:
    """How close the two tokens were, for each answer that parts from the reference; after the timing."""
    rows = enumerate(zip(engine.run.prompts, engine.run.reference or [], outcome.answers, strict=False))
    found = {str(i): engine.margin(prompt, other, answer["token_ids"]) for i, (prompt, other, answer) in rows}
    return {prompt: both for prompt, both in found.items() if both is not None}


def _settings(engine: Engine) -> dict[str, Any]:
    from vllm_idlm import settings

    return settings.of(engine.core.vllm_config).model_dump()


def main(descriptor: int, spec: str, kind: type = Run, work: Callable[[Any, Callable], Any] = execute) -> int:
    """Do the `work` of `spec`, which is of that `kind`, and write events to `descriptor`; the exit status."""
    with os.fdopen(descriptor, "w", buffering=1, encoding="utf-8") as events:

        def emit(event: dict[str, Any]) -> None:
            events.write(json.dumps(event) + "\n")

        try:
            emit({"done": asdict(work(kind(**json.loads(spec)), emit))})
        except Exception as error:
            traceback.print_exc()
            emit({"failed": f"{type(error).__name__}: {error}"})
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2]))
