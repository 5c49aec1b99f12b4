"""`idlm chat`: talk to a running server of the OpenAI kind, `idlm serve` among them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from vllm_idlm.cli.screen import err, fail, out

URL = "http://localhost:8000/v1"


class ChatError(RuntimeError):
    """The server did not answer, or refused; the message says which, and the fix."""


def chat(
    question: Annotated[str | None, typer.Argument(help="Ask this, print the answer and end.")] = None,
    url: Annotated[str, typer.Option(help="Base address of the server's API.")] = URL,
    model: Annotated[str | None, typer.Option(help="Served model; default: the server's first.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 512,
) -> None:
    """Chat with a running server; the answer streams in. Without QUESTION it goes on until Ctrl-D, with history."""
    messages = [{"role": "system", "content": system}] if system else []
    try:
        client = Client(url, model or first_model(url), temperature, max_tokens)
        if question is not None:
            _ask(client, messages, question)
            return
        err.print(f"{client.model} at {url}. Empty line or Ctrl-D ends.", style="dim", markup=False)
        while line := _read():
            _ask(client, messages, line)
    except ChatError as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _read() -> str:
    try:
        return out.input("[bold]> [/bold]").strip()
    except EOFError:
        return ""


def _ask(client: Client, messages: list[dict[str, str]], question: str) -> None:
    """Stream one answer to the screen and enter both sides into `messages`."""
    asked = [*messages, {"role": "user", "content": question}]
    answer = ""
    for piece in client.stream(asked):
        out.print(piece, end="", markup=False, soft_wrap=True)
        answer += piece
    out.print()
    messages[:] = [*asked, {"role": "assistant", "content": answer}]


class Client:
    """One model of a server."""

    def __init__(self, url: str, model: str, temperature: float, max_tokens: int) -> None:
        self.url, self.model = url.rstrip("/"), model
        self.options = {"temperature": temperature, "max_tokens": max_tokens}

    def stream(self, messages: list[dict[str, str]]) -> Iterator[str]:
        """The answer, piece by piece. Raises ChatError."""
        import httpx

        body = {"model": self.model, "messages": messages, "stream": True, **self.options}
        timeout = httpx.Timeout(10, read=600)
        try:
            with httpx.stream("POST", f"{self.url}/chat/completions", json=body, timeout=timeout) as response:
                if response.status_code != 200:
                    response.read()
                    raise ChatError(refusal(response.status_code, response.text))
                yield from pieces(response.iter_lines())
        except httpx.HTTPError as error:
            raise unreachable(self.url, error) from None


def pieces(lines: Iterator[str]) -> Iterator[str]:
    """The texts in a stream of server-sent events, up to [DONE]. Raises ChatError on an error sent in the stream."""
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise ChatError(refusal(event["error"].get("code", 500), data))
        for choice in event.get("choices", []):
            if text := choice.get("delta", {}).get("content"):
                yield text


def first_model(url: str) -> str:
    """The name of the first model that the server lists. Raises ChatError."""
    import httpx

    try:
        response = httpx.get(f"{url.rstrip('/')}/models", timeout=10)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise unreachable(url, error) from None
    if response.status_code != 200:
        raise ChatError(refusal(response.status_code, response.text))
    try:
        return response.json()["data"][0]["id"]
    except (ValueError, LookupError, TypeError):
        raise ChatError(f"{url}/models does not answer like an OpenAI-compatible server; --url ends in /v1") from None


def refusal(status: Any, text: str) -> str:
    """The server's own words for a refused request."""
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = text.strip() or "no reason given"
    return f"the server refused ({status}): {message}"


def unreachable(url: str, error: Exception) -> ChatError:
    """The error for a server that does not answer, with the command that starts one."""
    return ChatError(
        f"no server answers at {url} ({type(error).__name__}: {error}). Start one in another terminal: "
        "idlm serve smollm2-135m-risd (it takes a minute to be ready), or give its address by --url http://HOST:PORT/v1"
    )
