"""`idlm doctor --engine` on Model Runner V2: forced drafts are judged as they must be, and a planted fault is found."""

from __future__ import annotations

import pytest

from tests.support.canaries import start, verdict
from vllm_idlm.cli import canary
from vllm_idlm.cli._canary import AS_THEY_ARE, RIGHT, WRONG

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """With asynchronous scheduling."""
    return start(tmp_path_factory.mktemp("canary"), async_scheduling=True)


def test_a_sound_engine_passes(started):
    found, ran = verdict(started, AS_THEY_ARE, RIGHT, WRONG)
    assert found.good, found.sentence
    assert "132 of 132 tokens equal in each of 3 runs" in found.sentence
    assert "Model Runner V2" in found.sentence
    _, right, wrong = ran.cases
    assert canary.figures(right) == (4, 96, 96)
    tpf, drafted, accepted = canary.figures(wrong)
    assert (tpf, drafted > 300, accepted) == (1, True, 0)


def test_rejected_drafts_that_are_kept_are_found(started, monkeypatch):
    from vllm_idlm.v2 import sampler

    def accept_one(rows):
        verdict = original(rows)
        at = (rows.num_drafts > 0) & (verdict.emitted == 1)
        verdict.tokens[at, 1] = verdict.tokens[at, 0]
        verdict.tokens[at, 0] = rows.drafts[at, 0].to(verdict.tokens.dtype)
        verdict.emitted[at] += 1
        return verdict

    original = sampler.verify_rows
    monkeypatch.setattr(sampler, "verify_rows", accept_one)
    found, _ = verdict(started, WRONG)
    assert found.sentence.startswith("NOT exact: with drafts forced wrong")


def test_right_drafts_that_are_rejected_are_found(started, monkeypatch):
    from vllm_idlm.v2 import sampler

    def accept_fewer(rows):
        verdict = original(rows)
        verdict.emitted.clamp_(max=3)
        return verdict

    original = sampler.verify_rows
    monkeypatch.setattr(sampler, "verify_rows", accept_fewer)
    found, _ = verdict(started, RIGHT)
    assert found.sentence.startswith("NOT in order: with drafts forced right, the right draft of prompt 1, token 4 was")
