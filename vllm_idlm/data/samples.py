"""What the trainer reads: samples of prompt and answer token ids, from `idlm data` or from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import files
from .errors import DataError
from .keys import EVAL, TRAIN, prompt_key, side
from .prompts import chat

__all__ = ["DataError", "Sample", "read", "split_by_prompt"]
_NEEDS = '"prompt_ids" and "answer_ids", or (with a tokenizer) "messages" or "prompt" and "answer"'


@dataclass(frozen=True)
class Sample:
    """One prompt and one answer, as token ids; the answer ends with the end-of-sequence token if it came to its end."""

    prompt_ids: list[int]
    answer_ids: list[int]
    prompt_key: str  # the same for every answer to the same prompt
    kind: str | None = None
    temperature: float | None = None


def read(
    paths: str | Path | Sequence[str | Path], split: str | None = TRAIN, tokenizer: Any | None = None
) -> list[Sample]:
    """Samples of a folder written by `idlm data`, of a .jsonl or .parquet file, or of several of these, in order.

    Of a folder, the shards of `split` are read ("train", "eval", or None for both). A file is read whole: it has no
    split of its own unless `split_by_prompt` makes one. Rows hold token ids, or texts, which need `tokenizer` (a
    transformers one): "messages" that end with the assistant's turn, or "prompt" and "answer"; the end-of-sequence
    token is then added. Raises DataError, naming file and row.
    """
    if split not in (TRAIN, EVAL, None):
        raise DataError(f"split {split!r}: allowed are 'train', 'eval' and None (both)")
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    sources = [file for path in given for file in _sources(Path(path), split)]
    found = [_sample(row, place, tokenizer) for file in sources for place, row in files.rows(file)]
    if not found:
        raise DataError(f"{', '.join(map(str, given))}: no sample; make some with `idlm data OUT_DIR`")
    return found


def split_by_prompt(samples: Iterable[Sample], fraction: float) -> tuple[list[Sample], list[Sample]]:
    """(train, eval): about `fraction` of the prompts held out, all answers to a prompt on the same side.

    The side hangs on the prompt alone, so that it stays whatever else is in `samples`.
    """
    if not 0 <= fraction < 1:
        raise DataError(f"fraction {fraction!r}: the share of prompts to hold out; allowed is 0 up to, not with, 1")
    parts: dict[str, list[Sample]] = {TRAIN: [], EVAL: []}
    for sample in samples:
        parts[side(sample.prompt_key, fraction)].append(sample)
    return parts[TRAIN], parts[EVAL]


def _sources(path: Path, split: str | None) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder; make one with `idlm data {path}`, or correct the path")
    wanted = [TRAIN, EVAL] if split is None else [split]
    found = [file for name in wanted for file in sorted(path.glob(f"{name}-*")) if file.suffix[1:] in files.FORMATS]
    if not found:
        raise DataError(f"{path}: no {' or '.join(wanted)}-*.jsonl or .parquet; make them with `idlm data {path}`")
    return found


def _sample(row: dict[str, Any], place: str, tokenizer: Any | None) -> Sample:
    if row.get("prompt_ids") is None and row.get("answer_ids") is None:
        prompt, answer, key = _from_text(row, place, tokenizer)
    else:
        prompt, answer = _ids(row, "prompt_ids", place), _ids(row, "answer_ids", place)
        key = row.get("prompt_key") or prompt_key(prompt)
    temperature = row.get("temperature")
    return Sample(prompt, answer, str(key), row.get("kind"), None if temperature is None else float(temperature))


def _ids(row: dict[str, Any], name: str, place: str) -> list[int]:
    value = row.get(name)
    if not isinstance(value, list) or not value:
        shown = "missing" if value is None else f"{str(value)[:60]} is no list with token ids in it"
        raise DataError(f"{place}: {name}: {shown}; each row needs {_NEEDS}")
    for token in value:
        if type(token) is not int or token < 0:
            raise DataError(f"{place}: {name}: {token!r} is no token id; whole numbers from 0 are")
    return value


def _from_text(row: dict[str, Any], place: str, tokenizer: Any | None) -> tuple[list[int], list[int], str]:
    messages = _dialogue(row, place)
    if tokenizer is None:
        raise DataError(f"{place}: it holds texts, not token ids; give a tokenizer, or data made by `idlm data`")
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError(f"{place}: the tokenizer has no end-of-sequence token to end the answer with; set eos_token")
    answer = tokenizer.encode(messages[-1]["content"], add_special_tokens=False)
    return prompt_ids(tokenizer, messages[:-1], place), [*answer, end], prompt_key(messages[:-1])


def _dialogue(row: dict[str, Any], place: str) -> list[dict[str, str]]:
    """The chat of a row of texts, the answer last."""
    if row.get("messages") is not None:
        messages = list(chat(row["messages"], place))
        if len(messages) < 2 or messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
            raise DataError(f"{place}: messages: no answer; the last must be the assistant's, after a prompt")
        return messages
    texts = {name: row.get(name) for name in ("prompt", "answer")}
    lacking = [name for name, text in texts.items() if not isinstance(text, str) or not text]
    if lacking:
        raise DataError(f"{place}: no {' and no '.join(lacking)} (it has {', '.join(row) or 'nothing'}); add {_NEEDS}")
    return [{"role": "user", "content": texts["prompt"]}, {"role": "assistant", "content": texts["answer"]}]


def prompt_ids(tokenizer: Any, messages: Sequence[dict[str, str]], place: str) -> list[int]:
    """Token ids of a chat with the beginning of the answer's turn; of the bare text without a chat template."""
    if getattr(tokenizer, "chat_template", None):
        asked = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        return list(tokenizer.apply_chat_template(list(messages), **asked))
    if len(messages) > 1:
        raise DataError(
            f"{place}: the tokenizer has no chat template for {len(messages)} messages; give single prompts"
        )
    return list(tokenizer.encode(messages[0]["content"]))
