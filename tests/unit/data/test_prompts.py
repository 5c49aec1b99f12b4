"""Prompts from files: each kind of them, and bad ones named."""

from __future__ import annotations

import pytest

from tests.support.jsonl import write_jsonl
from vllm_idlm.data import prompts
from vllm_idlm.data.errors import DataError


def test_prompts_from_each_kind_of_file(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("one\n\n two \none\n")
    assert [(p.index, p.messages[0]["content"]) for p in prompts.load(text)] == [(0, "one"), (1, "two")]
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    rows = [{"prompt": "one", "kind": "k"}, {"messages": [*chat, {"role": "assistant", "content": "a"}]}]
    read = prompts.load(write_jsonl(tmp_path / "a.jsonl", *rows))
    assert [(list(p.messages), p.kind) for p in read] == [([{"role": "user", "content": "one"}], "k"), (chat, None)]
    assert len(prompts.load(text, count=1)) == 1
    assert read[0].key == prompts.load(text)[0].key


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "x"}, r'line 1: no "prompt" text.*it has text'),
        ({"messages": []}, "line 1: messages: .* no list"),
        ({"messages": [{"role": "user"}]}, "lacks a text for role or content"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "nothing comes before the assistant"),
    ],
)
def test_bad_prompts_are_named(tmp_path, row, said):
    with pytest.raises(DataError, match=said):
        prompts.load(write_jsonl(tmp_path / "a.jsonl", row))
