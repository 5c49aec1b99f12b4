"""The plan of samples: the split, the draws, and settings that are refused."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.unit.data.test_recipe import KINDS
from vllm_idlm.data import keys, plan, prompts
from vllm_idlm.data.errors import DataError


def plan_settings(**other):
    base = {"model": "m", "fingerprint": "f", "dtype": "float32", "chat_template": None}
    return plan.Settings(**{**base, "prompts": "p", "prompts_sha256": "s", "count": 10, **other})


def test_split_hangs_on_the_prompt_alone():
    many = prompts.built_in("chat", 2000, 0)
    held = {p.key for p in many if keys.side(p.key, 0.05) == "eval"}
    assert 60 < len(held) < 140
    assert {p.key for p in many[:500] if keys.side(p.key, 0.05) == "eval"} == held & {p.key for p in many[:500]}
    assert held < {p.key for p in many if keys.side(p.key, 0.2) == "eval"}
    shards = plan.shards(many, plan_settings(shard=512))
    assert [(s.name, len(s.prompts)) for s in shards][:2] == [
        ("eval-00000.jsonl", len(held)),
        ("train-00000.jsonl", 512),
    ]
    assert sum(len(s.prompts) for s in shards) == 2000


def test_draws_are_seeded_one_by_one_and_greedy_once():
    many = prompts.built_in("chat", 600, 0)
    settings = plan_settings(answers=4)
    drawn = [plan.draws(prompt, settings) for prompt in many]
    assert drawn[5] == plan.draws(many[5], settings)
    assert all([d.temperature for d in four].count(0) == 1 for four in drawn)
    assert len({d.seed for four in drawn for d in four}) == 2400
    one = Counter((p.kind, plan.draws(p, plan_settings())[0].temperature) for p in many)
    assert len(one) == 3 * KINDS  # no kind sticks to one temperature
    assert all(150 < sum(n for (_, t), n in one.items() if t == value) < 250 for value in (0, 0.7, 1.0))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"temperatures": (-1.0,)}, "--temperatures -1"),
        ({"temperatures": (float("nan"),)}, "--temperatures nan"),
        ({"answers": 2, "temperatures": (0.0,)}, "would be the same"),
        ({"answers": 0}, "--answers 0: allowed is 1 to 1000"),
        ({"max_tokens": 0}, "--max-tokens 0: allowed is 1 and up"),
        ({"shard": 0}, "--shard 0"),
        ({"held_out": 1.0}, "--held-out 1.0"),
        ({"format": "csv"}, "--format csv: allowed are jsonl, parquet"),
    ],
)
def test_impossible_settings_are_refused(other, said):
    with pytest.raises(DataError, match=said):
        plan.check(plan_settings(**other))


def test_parquet_without_pyarrow_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match="pip install pyarrow, or use jsonl"):
        plan.check(plan_settings(format="parquet"))
