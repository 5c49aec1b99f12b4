"""Self-distillation: a model's own answers to prompts, made by vLLM shard after shard into a folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import files
from .plan import Draw, Settings, Shard, draws
from .prompts import Prompt
from .samples import prompt_ids

OnAnswer = Callable[[int], None]  # (tokens of an answer that is finished)


@dataclass
class Made:
    """What one run did. Seconds are those of generation, without the engine's start."""

    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0


def encode(prompts: list[Prompt], tokenizer: Any) -> dict[int, list[int]]:
    """Prompt index -> token ids under the chat template. Raises DataError for a chat that cannot be rendered."""
    return {p.index: prompt_ids(tokenizer, p.messages, f"prompt {p.index}") for p in prompts}


def missing(folder: Path, shards: list[Shard]) -> list[Shard]:
    """The shards that are not there yet."""
    return [shard for shard in shards if not (folder / shard.name).exists()]


def make(
    llm: Any, folder: Path, todo: list[Shard], ids: dict[int, list[int]], settings: Settings, on_answer: OnAnswer
) -> Iterator[tuple[Shard, Made]]:
    """Generate `todo` into `folder`, each shard written whole once all of it is there; yields (shard, all so far)."""
    made = Made()
    for shard in todo:
        began = time.perf_counter()
        asked = [draw for prompt in shard.prompts for draw in draws(prompt, settings)]
        rows = answers(llm, asked, ids, settings, on_answer)
        made.seconds += time.perf_counter() - began
        files.write(folder / shard.name, rows)
        made.samples += len(rows)
        made.tokens += sum(len(row["answer_ids"]) for row in rows)
        yield shard, made


def answers(
    llm: Any, asked: list[Draw], ids: dict[int, list[int]], settings: Settings, on_answer: OnAnswer
) -> list[dict[str, Any]]:
    """One row for each draw, in order, by the engine of `llm` (a vllm.LLM): `LLM.generate`, told of each answer."""
    engine = llm.llm_engine
    place = {f"data-{time.monotonic_ns()}-{i}": i for i in range(len(asked))}
    for name, draw in zip(place, asked, strict=True):
        engine.add_request(name, {"prompt_token_ids": ids[draw.prompt.index]}, _sampling(draw, settings))
    rows: list[dict[str, Any]] = [{}] * len(asked)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                index = place[output.request_id]
                rows[index] = _row(asked[index], ids[asked[index].prompt.index], output.outputs[0])
                on_answer(len(rows[index]["answer_ids"]))
    return rows


def _sampling(draw: Draw, settings: Settings) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=draw.temperature, top_p=settings.top_p, max_tokens=settings.max_tokens,
        seed=draw.seed if draw.temperature else None, output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip


def _row(draw: Draw, prompt: list[int], answer: Any) -> dict[str, Any]:
    return {
        "prompt_key": draw.prompt.key,
        "prompt_index": draw.prompt.index,
        "answer_index": draw.answer_index,
        "kind": draw.prompt.kind,
        "temperature": draw.temperature,
        "seed": draw.seed,
        "finish_reason": answer.finish_reason,
        "prompt_ids": list(prompt),
        "answer_ids": list(answer.token_ids),
        "messages": [*draw.prompt.messages, {"role": "assistant", "content": answer.text}],
        "text": answer.text,
    }
