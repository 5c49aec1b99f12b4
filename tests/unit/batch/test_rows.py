"""The rows of `idlm batch`: what a line may say, and what is refused by its line."""

from __future__ import annotations

import pytest

from tests.support.jsonl import write_jsonl
from vllm_idlm.batch.errors import BatchError
from vllm_idlm.batch.rows import read


def test_rows_carry_what_they_say_over_the_defaults(tmp_path):
    file = write_jsonl(
        tmp_path / "in.jsonl", {"prompt": "Hello."}, {"id": 7, "prompt_ids": [1, 2], "sampling": {"max_tokens": 3}}
    )
    first, second = read(file, {"max_tokens": 8})
    assert (first["index"], first["prompt"], first["sampling"]["max_tokens"]) == (0, "Hello.", 8)
    assert (second["index"], second["id"], second["sampling"]["max_tokens"]) == (1, 7, 3)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"promt": "x"}, "'promt' is no field of row; allowed are id, prompt"),
        ({}, ".*given none"),
        ({"prompt": "x", "prompt_ids": [1]}, ".*given prompt and prompt_ids"),
        ({"prompt": "x", "sampling": {"temp": 1}}, "'temp' is no field of sampling"),
        ({"prompt": "x", "sampling": {"top_p": 2}}, "top_p: .*less than or equal to 1, given 2"),
        ({"prompt_ids": []}, "prompt_ids: .*at least 1 item"),
        ({"id": "a", "prompt": "x"}, r"id 'a' stands in .*line 1 too"),
    ],
)
def test_a_wrong_row_is_refused_by_its_line(tmp_path, row, words):
    file = write_jsonl(tmp_path / "in.jsonl", {"id": "a", "prompt": "y"}, row)
    with pytest.raises(BatchError, match=rf"line 2: {words}"):
        read(file, {})


def test_a_file_without_rows_is_refused(tmp_path):
    with pytest.raises(BatchError, match="holds no row"):
        read(write_jsonl(tmp_path / "in.jsonl"), {})
