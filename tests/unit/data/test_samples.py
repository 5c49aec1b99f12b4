"""Reading samples: ids or texts, bad ones named, split by prompt."""

from __future__ import annotations

import pytest

from tests.support.jsonl import write_jsonl
from vllm_idlm.data import keys, samples
from vllm_idlm.data.errors import DataError


def test_split_by_prompt_keeps_answers_together():
    made = [samples.Sample([i], [a], keys.prompt_key([i])) for i in range(300) for a in range(3)]
    train, held = samples.split_by_prompt(made, 0.2)
    assert len(train) + len(held) == 900
    assert {s.prompt_key for s in train}.isdisjoint(s.prompt_key for s in held)
    assert 100 < len(held) < 260
    with pytest.raises(DataError, match="fraction 1"):
        samples.split_by_prompt(made, 1)


class _Letters:
    """A tokenizer of code points, with the chat template 'each content, then !'."""

    eos_token_id, chat_template = 0, "yes"

    def encode(self, text, add_special_tokens=True):
        return [ord(c) for c in text]

    def apply_chat_template(self, messages, **_):
        return [ord(c) for m in messages for c in m["content"] + "!"]


def test_ids_are_read_as_they_are(tmp_path):
    rows = [
        {"prompt_ids": [1, 2], "answer_ids": [3], "kind": "k", "temperature": 1, "prompt_key": "p"},
        {"prompt_ids": [1, 2], "answer_ids": [4]},
    ]
    first, second = samples.read(write_jsonl(tmp_path / "a.jsonl", *rows))
    assert first == samples.Sample([1, 2], [3], "p", "k", 1.0)
    assert second == samples.Sample([1, 2], [4], keys.prompt_key([1, 2]))


def test_texts_need_a_tokenizer(tmp_path):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "ab"}]
    file = write_jsonl(tmp_path / "a.jsonl", {"messages": messages}, {"prompt": "q", "answer": "c"})
    first, second = samples.read([file], tokenizer=_Letters())
    assert (first.prompt_ids, first.answer_ids) == ([ord("q"), ord("!")], [ord("a"), ord("b"), 0])
    assert first.prompt_key == second.prompt_key
    with pytest.raises(DataError, match=r"line 1: it holds texts.*give a tokenizer"):
        samples.read(file)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt_ids": [1]}, "line 2: answer_ids: missing"),
        ({"prompt_ids": [1], "answer_ids": []}, "line 2: answer_ids: .* no list"),
        ({"prompt_ids": [1, -3], "answer_ids": [2]}, "line 2: prompt_ids: -3 is no token id"),
        ({"prompt_ids": [1, True], "answer_ids": [2]}, "prompt_ids: True is no token id"),
        ({"prompt": "q"}, r"line 2: no answer \(it has prompt\)"),
        ({"messages": [{"role": "user", "content": "q"}]}, "line 2: messages: no answer"),
        ([1], "line 2: list where an object is needed"),
    ],
)
def test_bad_samples_are_named(tmp_path, row, said):
    file = write_jsonl(tmp_path / "a.jsonl", {"prompt_ids": [1], "answer_ids": [1]}, row)
    with pytest.raises(DataError, match=said):
        samples.read(file, tokenizer=_Letters())


def test_bad_sources_are_named(tmp_path):
    for path, said in [
        (tmp_path / "none", "no such file"),
        (tmp_path, "no train-"),
        (write_jsonl(tmp_path / "a.csv"), "allowed are .jsonl and .parquet"),
        (write_jsonl(tmp_path / "empty.jsonl"), "no sample"),
    ]:
        with pytest.raises(DataError, match=said):
            samples.read(path)
    (tmp_path / "torn.jsonl").write_text('{"prompt_ids": [1')
    with pytest.raises(DataError, match=r"torn.jsonl, line 1: not JSON"):
        samples.read(tmp_path / "torn.jsonl")
    with pytest.raises(DataError, match="split 'test'"):
        samples.read(tmp_path, split="test")
