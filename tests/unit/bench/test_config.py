"""Configurations of `idlm bench`: the shipped ones, and methods by name."""

from __future__ import annotations

import pytest

from tests.support.paths import ROOT
from tests.support.rounds import asked
from vllm_idlm.bench import config

CONFIGS = ROOT / "configs" / "bench"


@pytest.mark.parametrize("name", sorted(p.stem for p in CONFIGS.glob("*.yaml")))
def test_shipped_configurations_load(name):
    found = config.load(CONFIGS / f"{name}.yaml")
    assert found.methods[0].name == "plain"
    assert len(found.methods) >= 5


def test_methods_by_name_and_groups(tmp_path):
    made = asked(tmp_path, methods=["plain", "isd-8", "ngram", "suffix"], alive=3)
    assert made.methods[1].speculative == {"method": "isd", "n": 8}
    assert [[m.name for m in group] for group in made.groups()] == [["plain", "isd-8", "ngram"], ["plain", "suffix"]]
    fixed = {"method": "isd", "n": 3, "coverage": "all"}
    assert config.Method(name="x", speculative=fixed).fixed_rows == (3, 2)
    assert made.methods[1].fixed_rows is None  # coverage auto
