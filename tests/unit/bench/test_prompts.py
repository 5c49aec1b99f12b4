"""The prompts of a comparison: each round's own, the same for every method."""

from __future__ import annotations

import pytest

from tests.support.rounds import asked
from vllm_idlm.bench import prompts
from vllm_idlm.bench.config import ConfigError


def test_every_round_has_prompts_of_its_own_the_same_for_all(tmp_path):
    made = asked(tmp_path, concurrency=[1, 4], rounds=2, requests=3)
    found = prompts.rounds(made)
    assert {place[1]: len(chats) for place, chats in found.items()} == {1: 3, 4: 4}
    texts = [chat[-1]["content"] for chats in found.values() for chat in chats]
    assert len(set(texts)) == len(texts) == 28
    assert prompts.rounds(made) == found
    assert prompts.repeated(made) == 1


def test_prompts_of_a_file(tmp_path):
    (tmp_path / "mine.txt").write_text("one\ntwo\n")
    made = asked(tmp_path, prompts=str(tmp_path / "mine.txt"))
    assert prompts.repeated(made) > 1
    with pytest.raises(ConfigError, match=r"prompts: .*nowhere"):
        prompts.pool(asked(tmp_path, prompts=str(tmp_path / "nowhere.txt")))
