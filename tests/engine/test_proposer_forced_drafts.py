"""Drafts forced to be right, wrong, and in between: the accept path at 100%, 0% and a mix, with equal output."""

from __future__ import annotations

import pytest

from tests.engine.test_proposer import PROMPTS, folders
from tests.support.engines import engine, isd, proposer, stats, tokens
from vllm_idlm.v1.proposer import Drawn

pytestmark = pytest.mark.vllm
__all__ = ["folders"]  # a fixture
MASK, LENGTH, FORWARDS = 1, 50, 3
OPTIONS = {"skip_tokenizer_init": True, "max_model_len": 128}


def _generate(llm, length=LENGTH, **options):
    from vllm import SamplingParams, TokensPrompt

    params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False, **options)
    return llm.generate([TokensPrompt(prompt_token_ids=p) for p in PROMPTS], params, use_tqdm=False)


def _other(token: int, by: int = 1) -> int:
    """Another token of the vocabulary of 48, neither the mask nor 0."""
    return 2 + (token - 2 + by) % 46


@pytest.fixture(scope="module")
def plain(folders):
    """prompt token ids -> plain decoding's answer."""
    return {tuple(o.prompt_token_ids): list(o.outputs[0].token_ids) for o in _generate(engine(folders[0], **OPTIONS))}


@pytest.fixture
def oracle(folders, plain, monkeypatch):
    """An ISD engine whose drafts are `right(place, token)` of plain decoding's own continuation."""

    def make(n, right, coverage="last"):
        llm = engine(folders[0], speculative_config=isd(n, mask_token_id=MASK, coverage=coverage), **OPTIONS)
        owner = proposer(llm)

        def draw(groups):
            drawn = {}
            for i, _, masks in groups:
                state = owner.runner.requests[owner.runner.input_batch.req_ids[i]]
                done = len(state.output_token_ids)
                ahead = plain[tuple(state.prompt_token_ids)][done : done + masks]
                drawn[i] = Drawn([right(done + j, token) for j, token in enumerate(ahead)], None, ())
            return drawn

        monkeypatch.setattr(owner, "_draw", draw)
        stats(llm)
        return llm

    return make


@pytest.mark.parametrize("n", [2, 4, 8, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 5, 16))])
def test_right_drafts_emit_n_tokens_a_forward(oracle, plain, n):
    llm = oracle(n, lambda place, token: token)
    length = 1 + FORWARDS * n  # one token from the prompt's forward, then n from each
    outputs = _generate(llm, length=length)
    assert [t[0] for t in tokens(outputs)] == [answer[:length] for answer in plain.values()]
    found = stats(llm)
    assert (found["cold"], found["rejected"]) == (0, 0)
    assert found["accepted_all"] == FORWARDS * len(PROMPTS)
    assert found["tpf"] == n


@pytest.mark.parametrize("coverage", ["all", pytest.param([0], marks=pytest.mark.slow)])
def test_a_rejection_that_was_covered_is_followed_by_a_verification(oracle, plain, coverage):
    """Wrong drafts with masks behind x: every forward verifies but an answer's last, with nothing left to draft."""
    llm = oracle(4, lambda place, token: _other(token), coverage)
    assert [t[0] for t in tokens(_generate(llm))] == list(plain.values())
    found = stats(llm)
    assert found["accepted_all"] == 0
    assert found["tpf"] == 1.0
    assert found["cold"] <= 2 * len(PROMPTS) < found["rejected"] / 5


def test_wrong_drafts_are_all_rejected(oracle, plain):
    llm = oracle(4, lambda place, token: _other(token))
    assert [t[0] for t in tokens(_generate(llm))] == list(plain.values())
    found = stats(llm)
    assert found["accepted_all"] == 0
    assert sum(found["accepted_per_position"]) == 0
    assert found["rejected"] > 20 * len(PROMPTS)
    assert found["tpf"] == 1.0


@pytest.mark.parametrize("every", [3, pytest.param(5, marks=pytest.mark.slow), 7])
def test_some_drafts_right(oracle, plain, every):
    llm = oracle(4, lambda place, token: token if place % every else _other(token, 7))
    assert [t[0] for t in tokens(_generate(llm))] == list(plain.values())
    found = stats(llm)
    assert found["rejected"] > 0
    assert sum(found["accepted_per_position"]) > 0
    assert found["emitted"] == len(PROMPTS) * (LENGTH - 1)


def test_right_drafts_with_options(oracle, plain, folders):
    """At full acceptance the options still see the right prefix at every verified row."""
    options = {"frequency_penalty": 0.8, "repetition_penalty": 1.2, "logprobs": 2, "min_tokens": 30}
    want = _generate(engine(folders[0], **OPTIONS), **options)
    answers = {tuple(o.prompt_token_ids): list(o.outputs[0].token_ids) for o in want}
    saved, plain_copy = dict(plain), plain
    plain_copy.update(answers)
    try:
        llm = oracle(4, lambda place, token: token)
        got = _generate(llm, **options)
    finally:
        plain_copy.update(saved)
    assert tokens(got) == tokens(want)
    assert stats(llm)["rejected"] == 0
    for a, b in zip(got, want, strict=True):
        for x, y in zip(a.outputs[0].logprobs, b.outputs[0].logprobs, strict=True):
            assert x.keys() == y.keys()
            assert all(abs(x[t].logprob - y[t].logprob) < 1e-3 for t in x)


def test_a_draft_is_never_the_mask_token(folders):
    llm = engine(folders[0], speculative_config=isd(mask_token_id=MASK, lora=folders[1]), **OPTIONS)
    llm.collective_rpc("isd_trace", args=(True,))
    _generate(llm)
    trace = stats(llm)["trace"]
    llm.collective_rpc("isd_trace", args=(False,))
    drafts = [d for forwards in trace.values() for f in forwards for d in f["drafts"]]
    assert len(drafts) > 50
    assert MASK not in drafts
