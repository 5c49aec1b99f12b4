"""What the plugin imports and calls of vLLM is looked up in its source."""

from __future__ import annotations

from tests.support.sources import RUNNER
from vllm_idlm.patching import Tree, uses


def test_the_plugin_imports_and_calls_nothing_that_this_vllm_lacks():
    assert uses.problems(Tree.installed()) == []


def test_what_the_plugin_imports_and_calls_is_looked_up(tree, tmp_path):
    ours = tmp_path / "ours.py"
    ours.write_text("from vllm.runner import Runner, Gone\nRunner(config=1)\nRunner(setting=1)\n")
    assert uses.problems(tree(runner=RUNNER), [ours]) == [
        "ours.py:1: vllm.runner:Gone is imported as Gone and does not exist",
        "ours.py:3: Runner() has no parameter setting",
    ]
