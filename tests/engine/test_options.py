"""Every sampling option under ISD equals plain decoding: tokens, text, stop reason, log-probabilities (float32)."""

from __future__ import annotations

import pytest

from tests.support.cases import CASES, sampling
from tests.support.engines import MASK, engine, isd, stats

pytestmark = pytest.mark.vllm
METHODS = ("risd-all", *(pytest.param(m, marks=pytest.mark.slow) for m in ("isd", "isd-n2", "isd-n8", "risd")))


def _engine(method: str, smol: str, adapter: str):
    config = {
        "plain": None,
        "isd": isd(mask_token_id=MASK),
        "isd-n2": isd(2, mask_token_id=MASK),
        "isd-n8": isd(8, mask_token_id=MASK),
        "risd": isd(lora=adapter),
        "risd-all": isd(lora=adapter, coverage="all"),
    }[method]
    return engine(smol, speculative_config=config)


@pytest.fixture(scope="module")
def results(smol, adapter):
    """method -> outputs of all cases, run together as one mixed batch."""
    done = {}

    def run(method: str):
        if method not in done:
            llm = _engine(method, smol, adapter)
            chats = [[{"role": "user", "content": prompt}] for _, prompt, _ in CASES]
            done[method] = llm.chat(chats, [sampling(o) for _, _, o in CASES], use_tqdm=False)
            if method != "plain":
                done[method, "stats"] = stats(llm)
        return done[method]

    run.stats = lambda method: (run(method), done[method, "stats"])[1]
    return run


def _close(ours, plain) -> bool:
    """Equal tokens, ranks and texts, log-probabilities to 1e-3."""
    if ours is None or plain is None:
        return ours is plain
    return len(ours) == len(plain) and all(
        a is b is None
        or (a.keys() == b.keys() and all(abs(a[t].logprob - b[t].logprob) < 1e-3 and a[t].rank == b[t].rank for t in a))
        for a, b in zip(ours, plain, strict=True)
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", range(len(CASES)), ids=[name for name, _, _ in CASES])
def test_option_equals_plain(results, method, case):
    plain, ours = results("plain")[case], results(method)[case]
    assert len(plain.outputs) == len(ours.outputs)
    for a, b in zip(plain.outputs, ours.outputs, strict=True):
        assert list(b.token_ids) == list(a.token_ids)
        assert (b.text, b.finish_reason, b.stop_reason) == (a.text, a.finish_reason, a.stop_reason)
        assert _close(b.logprobs, a.logprobs)
    assert _close(ours.prompt_logprobs, plain.prompt_logprobs)


def test_adapter_drafts_are_accepted(results):
    """The shipped adapter drafts for real: without this the equalities above would only test rejection."""
    found = results.stats("risd-all")
    assert found["accepted_all"] > 5
    assert sum(found["accepted_per_position"]) > 50
    assert found["accepted_per_position"][0] / found["drafted_per_position"][0] > 0.25


def test_the_options_do_something(results):
    """An option that changed nothing in plain decoding would make its equality empty."""
    by_name = {name: results("plain")[i].outputs[0].token_ids for i, (name, _, _) in enumerate(CASES)}
    assert len({tuple(by_name[name]) for name in ("presence", "frequency", "repetition", "bias-and-penalties")}) == 4
    assert MASK in by_name["mask-emitted"]
    assert MASK in by_name["mask-sometimes"]
    assert set(by_name["mask-sometimes"]) != {MASK}
    assert len(by_name["min-tokens"]) > len(by_name["natural-stop"])


def test_json_keeps_drafting(smol, adapter):
    """A grammar does not turn ISD into plain decoding: drafts are accepted under it, and its forwards are fewer."""
    llm = _engine("risd", smol, adapter)
    stats(llm)
    _, prompt, options = next(case for case in CASES if case[0] == "json")
    output = llm.chat([[{"role": "user", "content": prompt}]], sampling(options), use_tqdm=False)[0].outputs[0]
    found = stats(llm)
    assert sum(found["accepted_per_position"]) > 0
    assert found["forwards"] < len(output.token_ids) - 1
