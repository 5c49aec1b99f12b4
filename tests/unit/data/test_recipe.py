"""The recipe of prompts: distinct, balanced, the same each time."""

from __future__ import annotations

from collections import Counter

import pytest

from vllm_idlm.data import recipe
from vllm_idlm.data.errors import DataError

KINDS = 12


def test_recipe_is_distinct_balanced_and_deterministic():
    made = recipe.prompts("chat", 24000)
    assert len({text for text, _ in made}) == 24000
    assert set(Counter(kind for _, kind in made).values()) == {24000 // KINDS}
    assert recipe.prompts("chat", 100) == made[:100]
    assert len({text for text, _ in made[:600]} & {text for text, _ in recipe.prompts("chat", 600, seed=1)}) < 60
    assert not [text for text, _ in made if recipe._SLOT.search(text)]


def test_recipe_refuses_what_it_has_not(monkeypatch):
    monkeypatch.setattr(recipe, "_MOST", 5)
    with pytest.raises(DataError, match=r"--recipe songs.*allowed are chat"):
        recipe.prompts("songs", 1)
    with pytest.raises(DataError, match=r"--count 9999999: .* has \d+ different prompts"):
        recipe.prompts("chat", 9999999)
    with pytest.raises(DataError, match="'moon' to `slots`"):
        list(recipe._combinations("Go to the {moon}", {}, 0))
