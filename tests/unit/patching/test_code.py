"""Fingerprints of code: they change with the code alone."""

from __future__ import annotations

from tests.support.sources import RUNNER
from vllm_idlm.patching import code


def test_a_fingerprint_changes_with_the_code_alone(tree):
    def mark(text: str) -> str:
        return code.fingerprint(tree(runner=text).find("vllm.runner:Mixin.inherited").node)

    layout = RUNNER.replace('"""Says something."""', '"""Says more."""').replace("a + b  # and more", "(a +\n b)")
    assert mark(layout) == mark(RUNNER)
    assert mark(RUNNER.replace("a + b", "a - b")) != mark(RUNNER)
