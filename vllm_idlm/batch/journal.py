"""What a batch job has answered so far, on the disk: `OUT.partial`, a line an answer, in the order of finishing.

Its first line says which job it belongs to. A line counts once it is whole; what a kill cut is cut off. When every row
is there, they are written into OUT in the order of the input, and the journal goes. `OUT.job.json` then says which job
OUT answers.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from vllm_idlm.batch.errors import BatchError
from vllm_idlm.data.files import write_text


class Journal:
    """Open on a job's output; at most one process at a time. `done` are the indices of the rows answered.

    job: what makes two runs the same job (input, model, sampling ..); JSON. Raises BatchError if OUT or the journal
    belongs to another job, or another process has it open.
    """

    def __init__(self, out: Path, job: dict[str, Any], rows: int) -> None:
        self.out, self.job, self.rows = out, json.loads(json.dumps(job)), rows
        self.file = out.with_name(out.name + ".partial")
        self.record = out.with_name(out.name + ".job.json")
        self._places: dict[int, tuple[int, int]] = {}  # row -> offset and length of its line
        self._stream: BinaryIO | None = None

    def __enter__(self) -> Journal:
        if self.finished():
            return self
        self._stream = open(self.file, "a+b")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BatchError(f"{self.file} is being written by another run; wait for it, or give another OUT") from None
        self._resume()
        return self

    def __exit__(self, *error: object) -> None:
        if self._stream is not None:
            self._stream.close()

    @property
    def done(self) -> set[int]:
        """Indices of the rows answered."""
        return set(range(self.rows)) if self.finished() else set(self._places)

    def finished(self) -> bool:
        """Whether OUT holds all of this job already. Raises BatchError if it holds another's."""
        if not self.out.exists() or self.file.exists():
            return False
        try:
            theirs = json.loads(self.record.read_text())
        except (OSError, ValueError):
            raise BatchError(
                f"{self.out} exists and is no output of this job; remove it, or give another OUT"
            ) from None
        self._same(theirs, self.out)
        return True

    def add(self, answers: list[dict[str, Any]]) -> None:
        """Append answers (each with its row's `index`) and see them onto the disk. A row answered before stays."""
        new = {answer["index"]: answer for answer in answers if answer["index"] not in self._places}
        end = self._stream.seek(0, os.SEEK_END)
        for index, answer in new.items():
            line = json.dumps(answer, ensure_ascii=False).encode() + b"\n"
            self._stream.write(line)
            self._places[index] = end, len(line)
            end += len(line)
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def finish(self) -> int:
        """Write OUT, in the order of the input; the number of rows that hold an error. Safe to be killed within."""
        missing = self.rows - len(self._places)
        if missing:
            raise BatchError(f"{missing} of {self.rows} rows are not answered yet; run the command again")
        work, errors = self.out.with_name(f".{self.out.name}.tmp"), 0
        with work.open("wb") as stream:
            for index in range(self.rows):
                offset, length = self._places[index]
                self._stream.seek(offset)
                line = self._stream.read(length)
                errors += "error" in json.loads(line)
                stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())
        write_text(self.record, json.dumps(self.job, indent=1) + "\n")
        work.replace(self.out)
        self.file.unlink()
        return errors

    def _resume(self) -> None:
        """Read what is there, without the end that a kill cut; write the first line if nothing is."""
        whole = 0
        self._stream.seek(0)
        for number, line in enumerate(self._stream):
            if not line.endswith(b"\n"):
                break
            content = self._parse(number, line)
            if number == 0:
                self._same(content, self.file)
            else:
                self._places[content["index"]] = whole, len(line)
            whole += len(line)
        self._stream.truncate(whole)
        if whole == 0:
            self._stream.write(json.dumps(self.job).encode() + b"\n")
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            content = json.loads(line)
            if number and not 0 <= content["index"] < self.rows:
                raise ValueError(f"row {content['index']} of {self.rows}")
            if number and content["index"] in self._places:
                raise ValueError(f"row {content['index']} a second time")
        except (ValueError, KeyError, TypeError) as error:
            raise BatchError(
                f"{self.file}, line {number + 1}: not what a batch job writes ({error}); remove the file to start anew"
            ) from None
        return content

    def _same(self, theirs: Any, file: Path) -> None:
        if theirs == self.job:
            return
        theirs = theirs if isinstance(theirs, dict) else {}
        other = [k for k in self.job if theirs.get(k) != self.job[k]] or sorted(set(theirs) - set(self.job))
        was = "; ".join(f"{key} was {theirs.get(key)!r}, now {self.job.get(key)!r}" for key in other)
        raise BatchError(f"{file} belongs to another job: {was}. Give the same ones, or another OUT, or remove it")
