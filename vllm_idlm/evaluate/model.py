"""The harness's view of a server: an `LM` whose answers come from a file, and what is missing there from the server."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from typing import Any

from lm_eval.api.model import LM

from vllm_idlm.evaluate.answers import Answers, key
from vllm_idlm.evaluate.benchmarks import Benchmark, EvalError
from vllm_idlm.evaluate.client import Answer, Client


class Served(LM):
    """Chats only: the harness hands over messages as JSON, and the server applies its own template."""

    tokenizer_name = "server"

    def __init__(
        self, connect: Callable[[], Client], answers: Answers, concurrency: int, progress: Callable[[int, int], None]
    ) -> None:
        super().__init__()
        self.connect, self.answers, self.concurrency, self.progress = connect, answers, concurrency, progress
        self.asked: dict[tuple[str, int], str] = {}  # (task, document) -> name of the request, of the last call
        self.benchmark: Benchmark | None = None
        self.temperature, self.round = 0.0, 0

    def aim(self, benchmark: Benchmark, temperature: float, round_: int) -> None:
        """What the next requests belong to."""
        self.benchmark, self.temperature, self.round, self.asked = benchmark, temperature, round_, {}

    def chat_template(self, chat_template: bool | str = False) -> str:
        return ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return json.dumps(chat_history)

    def loglikelihood(self, requests: list[Any]) -> Any:
        raise EvalError("scoring of given texts decodes nothing, so ISD has no part in it")

    loglikelihood_rolling = loglikelihood

    def body(self, request: Any) -> dict[str, Any]:
        """The request as the server takes it, without the model's name."""
        context, options = request.args
        messages = json.loads(context)
        stop = list(options.get("until") or [])[:4]  # the most that the API takes; the harness cuts there too
        sampling = {"stop": stop, "max_tokens": options.get("max_gen_toks", 1024)}
        sampling |= self.benchmark.sampling() | {"temperature": self.temperature}
        if self.temperature > 0:
            sampling["seed"] = zlib.crc32(f"{request.task_name}/{request.doc_id}/{self.round}".encode()) >> 1
        made = {"messages": messages, **sampling}
        if messages[-1]["role"] == "assistant":
            made |= {"continue_final_message": True, "add_generation_prompt": False}
        if self.benchmark.thinking is not None:
            made["chat_template_kwargs"] = {"enable_thinking": self.benchmark.thinking}
        return made

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answers' texts, without the thoughts."""
        bodies = [self.body(request) for request in requests]
        names = [key(body) for body in bodies]
        self.asked |= {(r.task_name, r.doc_id): name for r, name in zip(requests, names, strict=True)}
        missing = {name: body for name, body in zip(names, bodies, strict=True) if name not in self.answers.held}
        if missing:
            self._fetch(list(missing), list(missing.values()))
        return [without_thoughts(self.answers.held[name].text, self.benchmark) for name in names]

    def _fetch(self, names: list[str], bodies: list[dict[str, Any]]) -> None:
        client = self.connect()
        longest = max(body["max_tokens"] for body in bodies)
        if client.length is not None and longest >= client.length:
            raise EvalError(
                f"{self.benchmark.name}: max_tokens {longest} leaves no room for the prompt in {client.length} tokens, "
                "the server's most. Fix: --max-tokens, or serve with a larger --max-model-len"
            )
        before, done = client.counters(), 0

        def take(i: int, answer: Answer) -> None:
            nonlocal done
            self.answers.put(names[i], answer)
            done += 1
            self.progress(done, len(names))

        client.answer(bodies, self.concurrency, take)
        self.answers.put_counters({name: value - before.get(name, 0.0) for name, value in client.counters().items()})


def without_thoughts(text: str, benchmark: Benchmark) -> str:
    """What stands behind the thoughts; nothing if they never ended."""
    if benchmark.think_end in text:
        return text.rsplit(benchmark.think_end, 1)[1].lstrip()
    return "" if benchmark.thinking and text.lstrip().startswith("<think>") else text
