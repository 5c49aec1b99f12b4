"""The file of answers: it goes on where it was cut, and knows a request by all that is asked."""

from __future__ import annotations

import pytest

from vllm_idlm.evaluate.answers import Answers, key
from vllm_idlm.evaluate.benchmarks import EvalError
from vllm_idlm.evaluate.client import Answer


def test_answers_go_on_where_they_were_cut(tmp_path):
    file = tmp_path / "a.jsonl"
    first = Answers(file, {"model": "m"})
    first.put("k1", Answer("one", "stop", [1, 2], [0]))
    first.put("k2", Answer("two", "stop"))
    first.put_counters({"forwards": 2.0})
    first.put_gap("k1", 0.125)
    file.write_text(file.read_text() + '{"key": "k3", "answ')
    again = Answers(file, {"model": "m"})
    assert again.held == first.held
    assert (again.counts, again.gaps) == ({"forwards": 2.0}, {"k1": 0.125})
    again.put("k3", Answer("three", "length"))
    assert list(Answers(file, {"model": "m"}).held) == ["k1", "k2", "k3"]


def test_answers_made_otherwise_are_refused(tmp_path):
    Answers(tmp_path / "a.jsonl", {"model": "m"})
    with pytest.raises(EvalError, match="made another way"):
        Answers(tmp_path / "a.jsonl", {"model": "other"})


def test_a_request_is_known_by_all_that_is_asked():
    body = {"messages": [{"role": "user", "content": "x"}], "temperature": 1.0, "seed": 1}
    assert key(body) == key(dict(reversed(body.items())))
    assert len({key(body), key({**body, "seed": 2}), key({**body, "temperature": 0.5})}) == 3
