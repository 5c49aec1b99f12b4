"""One engine of a batch job, as a Ray actor: it takes rows, and hands each answer back when it is finished."""

from __future__ import annotations

import os
from typing import Any


class Replica:
    """A vLLM engine in the actor's own process, which therefore dies with it: no kill leaves an engine behind."""

    def __init__(self, engine: dict[str, Any]) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        self.llm = LLM(**engine)
        self.engine = self.llm.llm_engine
        self.rows: dict[str, dict[str, Any]] = {}  # under way, by request id

    def ready(self) -> int:
        """Answers once the engine has started: this process's id."""
        return os.getpid()

    def turn(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Take `rows` in, and step until an answer is finished (or nothing is under way): the finished answers.

        A row that vLLM refuses is answered by its error; nothing else is disturbed.
        """
        answers = [refused for row in rows if (refused := self._add(row)) is not None]
        while not answers and self.engine.has_unfinished_requests():
            answers = [self._answer(output) for output in self.engine.step() if output.finished]
        return answers

    def _add(self, row: dict[str, Any]) -> dict[str, Any] | None:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError
        from vllm.sampling_params import RequestOutputKind

        name = str(row["index"])
        try:
            params = SamplingParams(**row["sampling"], output_kind=RequestOutputKind.FINAL_ONLY)
            self.engine.add_request(name, self._prompt(row), params)
        except (ValueError, VLLMValidationError) as error:
            return {**_head(row), "error": f"{type(error).__name__}: {error}"}
        self.rows[name] = row
        return None

    def _prompt(self, row: dict[str, Any]) -> Any:
        if row["prompt_ids"] is not None:
            return {"prompt_token_ids": row["prompt_ids"]}
        tokenizer = self.llm.get_tokenizer()
        chat = row["messages"] or [{"role": "user", "content": row["prompt"]}]
        if getattr(tokenizer, "chat_template", None) is None:
            if row["messages"] is not None:
                raise ValueError("the model has no chat template; give prompt or prompt_ids instead of messages")
            return row["prompt"]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        return {"prompt_token_ids": list(ids)}

    def _answer(self, output: Any) -> dict[str, Any]:
        made = output.outputs[0]
        return {
            **_head(self.rows.pop(output.request_id)),
            "text": made.text,
            "token_ids": list(made.token_ids),
            "finish_reason": made.finish_reason,
            "prompt_tokens": len(output.prompt_token_ids or []),
        }


def _head(row: dict[str, Any]) -> dict[str, Any]:
    """What every answer begins with."""
    return {"index": row["index"], **{key: row[key] for key in ("id", "meta") if row[key] is not None}}
