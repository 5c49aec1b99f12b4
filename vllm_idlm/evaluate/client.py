"""Answers from a server of the OpenAI kind, several at a time, and how close two tokens were for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from vllm_idlm.cli.chat import refusal
from vllm_idlm.evaluate.benchmarks import EvalError

_TIMEOUT = 3600.0  # seconds; an answer with thoughts may be 32,768 tokens
_TOP = 20  # log-probabilities that vLLM gives by default at most


@dataclass
class Answer:
    """What the server answered. The ids are None where it does not tell them."""

    text: str
    finish: str
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Client:
    """One model of one server."""

    def __init__(self, url: str, model: str | None = None) -> None:
        self.url = url.rstrip("/")
        served = self._models()
        self.card = next((m for m in served if model in (None, m["id"])), None)
        if self.card is None:
            raise EvalError(f"{url} serves {', '.join(m['id'] for m in served)}, not {model!r}")

    def _models(self) -> list[dict[str, Any]]:
        import httpx

        try:
            response = httpx.get(f"{self.url}/models", timeout=30)
            return response.json()["data"]
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError) as error:
            raise EvalError(
                f"no answer from {self.url}/models ({error}); is it running, and does it end in /v1?"
            ) from None

    @property
    def length(self) -> int | None:
        """Longest sequence that the server takes, if it says."""
        return self.card.get("max_model_len")

    def answer(self, bodies: list[dict[str, Any]], concurrency: int, take: Callable[[int, Answer], None]) -> None:
        """Ask every chat of `bodies`, `concurrency` at a time; `take(i, answer)` as each comes. Raises EvalError."""

        async def one(session: Any, i: int, body: dict[str, Any]) -> None:
            asked = {"model": self.card["id"], "return_token_ids": True, **body}
            take(i, _parsed(await self._post(session, "chat/completions", asked)))

        self._all(one, bodies, concurrency)

    def gaps(self, places: list[tuple[list[int], int, int]], concurrency: int) -> list[float | None]:
        """For (token ids, a, b): log p(a) - log p(b) of the token behind them; None if one is none of the likeliest."""
        found: list[float | None] = [None] * len(places)

        async def one(session: Any, i: int, place: tuple[list[int], int, int]) -> None:
            asked = {"model": self.card["id"], "prompt": place[0], "max_tokens": 1, "temperature": 0, "logprobs": _TOP}
            given = await self._post(session, "completions", {**asked, "return_tokens_as_token_ids": True})
            top = given["choices"][0]["logprobs"]["top_logprobs"][0]
            a, b = (top.get(f"token_id:{token}") for token in place[1:])
            found[i] = None if a is None or b is None else a - b

        self._all(one, places, concurrency)
        return found

    def _all(self, one: Callable[..., Any], items: list[Any], concurrency: int) -> None:
        """Run `one(session, i, item)` for all items; the first error ends it."""
        import httpx

        async def everything() -> None:
            free = asyncio.Semaphore(concurrency)
            limits = httpx.Limits(max_connections=concurrency)
            async with httpx.AsyncClient(timeout=_TIMEOUT, limits=limits) as session, asyncio.TaskGroup() as group:

                async def when_free(i: int, item: Any) -> None:
                    async with free:
                        await one(session, i, item)

                for i, item in enumerate(items):
                    group.create_task(when_free(i, item))

        try:
            asyncio.run(everything())
        except* (EvalError, httpx.HTTPError) as errors:
            raise EvalError(str(_leaf(errors)) or f"{self.url} ended the connection") from None

    async def _post(self, session: Any, path: str, body: dict[str, Any]) -> dict[str, Any]:
        response = await session.post(f"{self.url}/{path}", json=body)
        if response.status_code != 200:
            raise EvalError(f"{self.url}/{path}: {refusal(response.status_code, response.text)}")
        return response.json()

    def counters(self) -> dict[str, float]:
        """ISD's own counters from /metrics: forwards (by kind) and tokens; empty where there are none."""
        import httpx

        response = httpx.get(f"{self.url.removesuffix('/v1')}/metrics", timeout=60)
        return isd_counters(response.text.splitlines()) if response.status_code == 200 else {}


def isd_counters(lines: Iterable[str]) -> dict[str, float]:
    """The sums of `isd:forwards_total` and `isd:tokens_total` in Prometheus' text."""
    found: dict[str, float] = {}
    for line in lines:
        for name in ("forwards", "tokens"):
            if line.startswith(f"isd:{name}_total"):
                found[name] = found.get(name, 0.0) + float(line.rsplit(" ", 1)[1])
    return found


def _parsed(given: dict[str, Any]) -> Answer:
    choice = given["choices"][0]
    message = choice["message"]
    thought = message.get("reasoning") or message.get("reasoning_content")
    text = (f"<think>{thought}</think>" if thought else "") + (message.get("content") or "")
    return Answer(text, choice.get("finish_reason") or "", choice.get("token_ids"), given.get("prompt_token_ids"))


def _leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
