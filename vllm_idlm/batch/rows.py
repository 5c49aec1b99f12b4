"""The rows of a batch job: what a line of the input may hold, checked in full before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_idlm.batch.errors import BatchError
from vllm_idlm.data.errors import DataError
from vllm_idlm.data.files import rows


class Sampling(BaseModel):
    """How a row is answered: fields of vLLM's SamplingParams, with the bounds that vLLM has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_tokens: int = Field(256, ge=1)
    min_tokens: int = Field(0, ge=0)
    temperature: float = Field(0.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    seed: int | None = None
    stop: list[str] = []
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0)
    ignore_eos: bool = False


class Row(BaseModel):
    """One line of the input."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str | int | None = Field(None, description="Your own name for the row, unique; copied to the output.")
    prompt: str | None = Field(None, description="A user's turn (plain text where the model has no chat template).")
    messages: list[dict[str, str]] | None = Field(None, min_length=1, description="A chat, as OpenAI's API has it.")
    prompt_ids: list[int] | None = Field(None, min_length=1, description="Token ids, used as they are.")
    sampling: dict[str, Any] = Field(default_factory=dict, description="Fields of `Sampling`, over the job's own.")
    meta: Any = Field(None, description="Anything; copied to the output.")

    @model_validator(mode="after")
    def _one_prompt(self) -> Row:
        given = [name for name in ("prompt", "messages", "prompt_ids") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"needs one of prompt, messages and prompt_ids, given {' and '.join(given) or 'none'}")
        return self


def read(file: Path, defaults: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a .jsonl file in order, as plain dictionaries with `index` and complete `sampling`.

    Raises BatchError for the first row that is wrong, and for an id that stands twice.
    """
    found, ids = [], {}
    try:
        for index, (place, content) in enumerate(rows(file)):
            row = _row(place, content, defaults)
            if row["id"] is not None and ids.setdefault(row["id"], place) != place:
                raise BatchError(f"{place}: id {row['id']!r} stands in {ids[row['id']]} too; make ids unique")
            found.append({"index": index, **row})
    except DataError as error:
        raise BatchError(str(error)) from None
    if not found:
        raise BatchError(f"{file} holds no row; give one JSON object a line, such as " + '{"prompt": "Hello."}')
    return found


def _row(place: str, content: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    try:
        row = Row(**content)
        sampling = Sampling(**{**defaults, **row.sampling})
    except (ValidationError, TypeError) as error:
        raise BatchError(f"{place}: {_words(error)}") from None
    return {**row.model_dump(), "sampling": sampling.model_dump()}


def _words(error: ValidationError | TypeError) -> str:
    if isinstance(error, TypeError):
        return str(error)
    fields = Sampling.model_fields if error.title == "Sampling" else Row.model_fields
    lines = []
    for item in error.errors():
        name = ".".join(map(str, item["loc"]))
        if item["type"] == "extra_forbidden":
            lines.append(f"{name!r} is no field of {error.title.lower()}; allowed are {', '.join(fields)}")
        else:
            lines.append(f"{name}: {item['msg']}, given {item['input']!r}" if name else item["msg"])
    return "; ".join(lines)
