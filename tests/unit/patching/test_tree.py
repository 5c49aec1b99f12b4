"""vLLM's source as a tree: its version, names through imports and parents, and what is no vLLM."""

from __future__ import annotations

import types
from importlib.metadata import version

import pytest

from tests.support.paths import ROOT
from tests.support.sources import RUNNER
from vllm_idlm import patching
from vllm_idlm.patching import Tree
from vllm_idlm.patching.tree import TreeError


def test_the_version_is_that_of_the_vllm_that_python_would_import(tmp_path, monkeypatch):
    assert patching.vllm_version().partition("+")[0] == version("vllm").partition("+")[0]
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    (tmp_path / "vllm-7.8.9.dist-info").mkdir()
    (tmp_path / "vllm-7.8.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 7.8.9\n")
    spec = types.SimpleNamespace(origin=str(tmp_path / "vllm" / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    assert patching.vllm_version() == "7.8.9"
    assert Tree(tmp_path).version == "7.8.9"


def test_a_target_is_looked_up_through_imports_and_parents(tree):
    found = tree(runner=RUNNER, sub__of____init__="from ..runner import Runner as Other\n")
    assert found.find("vllm.sub:Other.inherited").node.name == "inherited"
    assert found.find("vllm.runner:Runner.step").text.startswith("    def step")
    assert found.find("vllm.runner:Runner.nothing") is None


@pytest.mark.parametrize("place", ["nowhere", "README.md"])
def test_what_is_no_vllm_is_refused(place):
    with pytest.raises(TreeError, match=r"holds no vllm/__init__\.py: give a folder"):
        Tree(ROOT / place)
