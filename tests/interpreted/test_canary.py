"""`idlm doctor --engine` on Model Runner V2: forced drafts are judged as they must be, and a planted fault is found."""

from __future__ import annotations

import pytest

from tests import tiny
from tests.engines import engine, isd
from vllm_idlm.cli import _canary, canary
from vllm_idlm.cli._canary import AS_THEY_ARE, RIGHT, WRONG, Case, Found

pytestmark = pytest.mark.vllm
BATCHES = [[[3, 7, 11, 2], [5, 5, 9] * 15, [13]], [[40, 2, 40, 2, 40]]]
OPTIONS = {"skip_tokenizer_init": True, "max_model_len": 128, "max_num_seqs": 3, "max_num_batched_tokens": 256}
MASK = 1


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Plain decoding's Found, and an ISD engine with a draft adapter and asynchronous scheduling."""
    root = tmp_path_factory.mktemp("canary")
    model = tiny.write_tiny(root / "model", vocab=48)
    plain = engine(str(model), **OPTIONS)
    answers = _canary.ask(plain, BATCHES, 33)
    found = Found(BATCHES, [spelt(Case("plain", answers, 0.0))], _canary.machine(plain.llm_engine.vllm_config))
    config = isd(mask_token_id=MASK, lora=str(tiny.write_adapter(root / "draft", model, scale=0.5)), coverage="all")
    return found, engine(str(model), speculative_config=config, async_scheduling=True, **OPTIONS)


def spelt(case):
    case.pieces = [[str(t) for t in ids] for ids in case.answers]
    return case


def verdict(started, *names):
    plain, llm = started
    reference = plain.cases[0].answers
    cases = [spelt(_canary.compare(llm, name, BATCHES, reference, MASK)) for name in names]
    found = Found(BATCHES, cases, _canary.machine(llm.llm_engine.vllm_config))
    return canary.judge(plain, found), found


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
