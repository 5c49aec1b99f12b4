"""Rows in files: jsonl and parquet, read with their places, written whole or not at all."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import DataError

FORMATS = ("jsonl", "parquet")


def rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a .jsonl or .parquet file with the words for its place. Raises DataError."""
    if file.suffix == ".jsonl":
        yield from _jsonl(file)
    elif file.suffix == ".parquet":
        yield from _parquet(file)
    else:
        raise DataError(
            f"{file}: the format is told by the name, allowed are .jsonl and .parquet; rename or convert it"
        )


def write(file: Path, content: list[dict[str, Any]]) -> None:
    """Write rows into `file` (format by its suffix): under another name first, so that it is whole or absent."""
    if file.suffix == ".jsonl":
        write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content))
        return
    work = file.with_name(f".{file.name}.tmp")
    arrow, parquet = pyarrow()
    parquet.write_table(arrow.Table.from_pylist(content, schema=_schema(arrow)), work)
    work.replace(file)


def write_text(file: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    work = file.with_name(f".{file.name}.tmp")
    with work.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    work.replace(file)


def pyarrow() -> tuple[Any, Any]:
    """pyarrow and pyarrow.parquet. Raises DataError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError("parquet needs pyarrow, which is not installed; pip install pyarrow, or use jsonl") from None
    return pyarrow, pyarrow.parquet


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` against a second run that would write into it; let go when the process ends."""
    import fcntl

    with (folder / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"{folder} is being written by another run; wait for it or give another folder") from None
        yield


def _jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    try:
        with file.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield f"{file}, line {number}", _object(line, f"{file}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}, after line {number}: {error}; give a readable UTF-8 file of JSON lines") from None


def _object(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON ({error}); write one JSON object a line") from None
    if not isinstance(row, dict):
        raise DataError(f"{place}: {type(row).__name__} where an object is needed; write one JSON object a line")
    return row


def _parquet(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    arrow, parquet = pyarrow()
    try:
        table = parquet.read_table(file)
    except (OSError, arrow.ArrowException) as error:
        raise DataError(f"{file}: {error}; give a whole parquet file") from None
    content = itertools.chain.from_iterable(batch.to_pylist() for batch in table.to_batches(1024))
    for number, row in enumerate(content, 1):
        yield f"{file}, row {number}", row


def _schema(arrow: Any) -> Any:
    ids = arrow.list_(arrow.int32())
    message = arrow.struct([("role", arrow.string()), ("content", arrow.string())])
    return arrow.schema(
        [
            ("prompt_key", arrow.string()),
            ("prompt_index", arrow.int64()),
            ("answer_index", arrow.int32()),
            ("kind", arrow.string()),
            ("temperature", arrow.float64()),
            ("seed", arrow.int64()),
            ("finish_reason", arrow.string()),
            ("prompt_ids", ids),
            ("answer_ids", ids),
            ("messages", arrow.list_(message)),
            ("text", arrow.string()),
        ]
    )
