"""What happens to a batch in service (preemption, chunks, caching, aborts, adapters) changes no token (float32)."""

from __future__ import annotations

import pytest

from tests.support.engines import MASK, engine, isd, preemptions, proposer, stats, tokens, told

pytestmark = pytest.mark.vllm
TOPICS = [
    "the sea",
    "mountains",
    "the moon",
    "old trains",
    "bees",
    "a lost dog",
    "rain",
    "chess",
    "bread",
    "the desert",
]


def _prompts(count, words=8):
    filler = "Think about it carefully and be kind. " * words
    return [f"{filler}Tell me about {TOPICS[i % len(TOPICS)]}, please, in a few sentences." for i in range(count)]


def _params(length=40, **options):
    from vllm import SamplingParams

    return SamplingParams(**{"temperature": 0, "max_tokens": length, "ignore_eos": True, **options})


def _chat(llm, prompts, params, **options):
    return llm.chat([[{"role": "user", "content": p}] for p in prompts], params, use_tqdm=False, **options)


def _configs(adapter):
    return {
        "isd": isd(mask_token_id=MASK),
        "risd": isd(lora=adapter),
        "isd-all": isd(mask_token_id=MASK, coverage="all"),
        "risd-all": isd(lora=adapter, coverage="all"),
    }


@pytest.mark.parametrize("method", [*(pytest.param(m, marks=pytest.mark.slow) for m in ("isd", "risd")), "risd-all"])
def test_preemption(smol, adapter, method):
    """A KV cache too small for the batch: requests are preempted and resumed, the output stays the same."""
    prompts, params = _prompts(5, words=1), _params(32)
    want = tokens(_chat(engine(smol), prompts, params))
    small = {"num_gpu_blocks_override": 9, "block_size": 32, "max_model_len": 256, "enable_prefix_caching": False}
    llm = engine(smol, speculative_config=_configs(adapter)[method], **small)
    preempted = preemptions(llm)
    assert tokens(_chat(llm, prompts, params)) == want
    assert len(preempted) >= 2, "the KV cache was large enough: nothing was preempted"


@pytest.mark.parametrize(
    ("method", "budget"),
    [
        *(("risd-all", budget) for budget in (5, 16)),
        *(("isd", 5), ("isd-all", 16)),
        *(
            pytest.param(m, b, marks=pytest.mark.slow)
            for m in ("isd", "risd", "isd-all", "risd-all")
            for b in (5, 16, 64)
        ),
    ],
)
def test_chunked_prompts_and_rows(smol, adapter, method, budget):
    """A token budget that cuts prompts, and at 5 also the rows of seven slots themselves (of sixteen at 16)."""
    prompts, params = _prompts(3, words=1), _params(14)
    want = tokens(_chat(engine(smol), prompts, params))
    limits = {"max_num_batched_tokens": budget, "max_num_seqs": 1 if budget < 16 else 2, "enable_prefix_caching": False}
    row = {"risd": 7, "risd-all": 16}.get(method, 0)
    if budget < limits["max_num_seqs"] * row:
        from vllm import EngineArgs

        with pytest.raises(ValueError, match="max_num_batched_tokens"):
            EngineArgs(smol, speculative_config=_configs(adapter)[method], **limits).create_engine_config()
        return
    llm = engine(smol, speculative_config=_configs(adapter)[method], **limits)
    stats(llm)
    assert tokens(_chat(llm, prompts, params)) == want


@pytest.mark.parametrize("method", [*(pytest.param(m, marks=pytest.mark.slow) for m in ("isd", "risd")), "risd-all"])
def test_prefix_cache_cold_and_warm(smol, adapter, method):
    """Blocks filled by ISD's forwards serve later requests: no mask's keys or rejected draft's keys are among them."""
    prompts, params = _prompts(2, words=8), _params(40)
    want = tokens(_chat(engine(smol), prompts, params))
    llm = engine(smol, speculative_config=_configs(adapter)[method], block_size=32)
    llm.reset_prefix_cache()
    cold = _chat(llm, prompts, params)
    assert tokens(cold) == want
    warm = _chat(llm, prompts, params)
    assert tokens(warm) == want
    assert all(o.num_cached_tokens > 0 for o in warm)
    # A follow-up turn runs over blocks that decoding filled.
    from vllm import TokensPrompt

    follow = [TokensPrompt(prompt_token_ids=[*o.prompt_token_ids, *o.outputs[0].token_ids]) for o in cold]
    expected = engine(smol).generate(follow, _params(16), use_tqdm=False)
    got = llm.generate(follow, _params(16), use_tqdm=False)
    assert all(g.num_cached_tokens > len(c.prompt_token_ids) for g, c in zip(got, cold, strict=True))
    assert tokens(got) == tokens(expected)


@pytest.mark.parametrize("method", [*(pytest.param(m, marks=pytest.mark.slow) for m in ("isd", "risd")), "risd-all"])
def test_abort_in_mid_stream(smol, adapter, method):
    """Requests come and go at different steps; the others' output does not change, and no record is left behind."""
    prompts, params = _prompts(6, words=0), _params(24)
    want = [t[0] for t in tokens(_chat(engine(smol), prompts, params))]
    llm = engine(smol, speculative_config=_configs(adapter)[method], block_size=32)
    inputs = [o.prompt_token_ids for o in _chat(engine(smol), prompts, _params(1))]
    run, done, aborted = llm.llm_engine, {}, {"r1", "r4"}
    for step in range(400):
        if step % 3 == 0 and step // 3 < len(prompts):
            i = step // 3
            run.add_request(f"r{i}", {"prompt_token_ids": inputs[i]}, params)
        if step == 14:
            run.abort_request(sorted(aborted))
        done |= {o.request_id: list(o.outputs[0].token_ids) for o in run.step() if o.finished}
        if step > 20 and not run.has_unfinished_requests():
            break
    assert {r: t for r, t in done.items() if r not in aborted} == {
        f"r{i}": tokens_ for i, tokens_ in enumerate(want) if f"r{i}" not in aborted
    }
    run.step()
    assert len(proposer(llm).records) == 0


@pytest.mark.parametrize(
    ("n", "coverage"), [*(pytest.param(n, "last", marks=pytest.mark.slow) for n in (2, 4, 8)), (4, "all")]
)
def test_up_to_the_models_length(smol, adapter, n, coverage):
    """Near max_model_len a row has fewer slots, never one over the edge; both stop at the same place."""
    limit = {"max_model_len": 56, "max_num_seqs": 4}
    prompts = [TOPICS[i] for i in range(3)]
    params = _params(None)
    want = _chat(engine(smol, **limit), prompts, params)
    got = _chat(engine(smol, speculative_config=isd(n, lora=adapter, coverage=coverage), **limit), prompts, params)
    assert tokens(got) == tokens(want)
    assert all(len(o.prompt_token_ids) + len(o.outputs[0].token_ids) == 56 for o in got)


def test_more_requests_than_slots(smol, adapter):
    prompts, params = _prompts(10, words=0), _params(12)
    want = tokens(_chat(engine(smol), prompts, params))
    llm = engine(smol, speculative_config=_configs(adapter)["risd-all"], block_size=32, max_num_seqs=3)
    assert tokens(_chat(llm, prompts, params)) == want


def test_a_prompt_of_one_token(smol, adapter):
    """vLLM pads such a request's first forward with slots of its own; they are mask slots to ISD."""
    from vllm import TokensPrompt

    prompts = [TokensPrompt(prompt_token_ids=[t]) for t in (1, 504, 9690)]
    want = tokens(engine(smol).generate(prompts, _params(16), use_tqdm=False))
    llm = engine(smol, speculative_config=_configs(adapter)["risd-all"], block_size=32)
    assert tokens(llm.generate(prompts, _params(16), use_tqdm=False)) == want


def test_mask_token_in_the_prompt(smol, adapter):
    """The mask token is an ordinary token in a prompt: base weights, same text."""
    from vllm import TokensPrompt

    base = [o.prompt_token_ids for o in _chat(engine(smol), TOPICS[:3], _params(1))]
    prompts = [TokensPrompt(prompt_token_ids=[MASK, *ids[:-3], MASK, MASK, *ids[-3:], MASK]) for ids in base]
    want = tokens(engine(smol).generate(prompts, _params(20), use_tqdm=False))
    llm = engine(smol, speculative_config=_configs(adapter)["risd-all"], block_size=32)
    assert tokens(llm.generate(prompts, _params(20), use_tqdm=False)) == want


@pytest.mark.slow  # and in test_options_at_random.py
@pytest.mark.parametrize("coverage", ["last", "all", "auto"])
def test_seeds_reproduce_whatever_the_company(smol, adapter, coverage):
    """A seeded request draws the same tokens alone and in a batch, with its prompt in one piece or in chunks."""
    prompt = _prompts(1, words=12)
    seeded, other = _params(24, temperature=0.9, seed=5), _params(24, temperature=1.0)
    config = isd(lora=adapter, coverage=coverage)
    llm = engine(smol, speculative_config=config)
    alone = tokens(_chat(llm, prompt, seeded))
    together = tokens(_chat(llm, [*prompt, *_prompts(4)], [seeded, *[other] * 4]))[:1]
    chunked = engine(smol, speculative_config=config, max_num_batched_tokens=64, max_num_seqs=4)
    assert together == alone
    assert tokens(_chat(chunked, prompt, seeded)) == alone
    assert tokens(_chat(llm, prompt, _params(24, temperature=0.9, seed=6))) != alone


def test_auto_gives_the_same_text_and_chooses(smol, adapter):
    """What clocks and acceptance choose changes from step to step and with the batch; the text does not."""
    params = _params(24)
    llm = engine(smol, speculative_config=isd(lora=adapter, coverage="auto"))
    found = proposer(llm).policy
    assert found.cost.table(16, True) >= found.cost.table(1, False) > 0, "rows were not measured"
    for count in (1, 3):
        prompts = _prompts(count, words=1)
        want = tokens(_chat(engine(smol), prompts, params))
        assert tokens(_chat(llm, prompts, params)) == want
        assert found.choice is not None
    for dear in (0.0, 1.0):  # rows for nothing: all groups; rows at a second each: plain decoding
        found.cost = told(lambda rows, masked, dear=dear: 1.0 + dear * rows)
        stats(llm)
        assert tokens(_chat(llm, prompts, params)) == want
        counted = stats(llm)
        if dear:
            assert found.choice.stride == 1
            assert counted["tpf"] < 1.1
        else:
            assert found.choice[:2] == (4, (0, 1, 2))
            assert counted["cold"] < 0.2 * counted["forwards"]


def test_all_outcomes_covered_leave_no_cold_forwards(smol, adapter):
    """But for an answer's last tokens; and more tokens come of each."""
    prompts, params, found = _prompts(4, words=0), _params(40), {}
    for coverage in ("last", "all"):
        llm = engine(smol, speculative_config=isd(lora=adapter, coverage=coverage))
        stats(llm)
        _chat(llm, prompts, params)
        found[coverage] = stats(llm)
    assert found["all"]["cold"] <= len(prompts) < found["last"]["cold"]
    assert found["all"]["tpf"] > 1.1 * found["last"]["tpf"]


def test_schedule_and_opt_out(smol, adapter):
    """A stride that falls with the number of requests, down to plain decoding, and a request that wants no ISD."""
    from vllm import SamplingParams

    prompts = _prompts(5, words=0)
    params = [SamplingParams(temperature=0, max_tokens=9 + 6 * i) for i in range(5)]
    params[4].extra_args = {"isd": "off"}
    want = tokens(_chat(engine(smol), prompts, params))
    config = isd(4, mask_token_id=MASK, lora=adapter, schedule=[[1, 2, 4], [3, 4, 2], [5, None, 1]])
    llm = engine(smol, speculative_config=config)
    llm.collective_rpc("isd_trace", args=(True,))
    stats(llm)
    outputs = _chat(llm, prompts, params)
    assert tokens(outputs) == want
    trace = {request.split("-")[0]: forwards for request, forwards in stats(llm)["trace"].items()}
    llm.collective_rpc("isd_trace", args=(False,))
    opted_out, other = trace[outputs[4].request_id], trace[outputs[3].request_id]
    assert all(not f["drafts"] and not f["masks"] for f in opted_out)
    assert {f["masks"] for f in other} >= {0, 1, 3}, "the schedule's three strides were not all seen"
    assert max(len(f["drafts"]) for f in other) == 3


@pytest.mark.slow  # the tiny models' adapters are all random
def test_a_random_adapter_changes_no_text(smol, adapter, tmp_path):
    """The quality of the draft adapter decides speed alone: noise in its place gives the same answers, slower."""
    from tests.support import tiny

    prompts, params = _prompts(4, words=0), _params(24)
    want = tokens(_chat(engine(smol), prompts, params))
    found = {}
    for name, lora in (("trained", adapter), ("noise", str(tiny.write_adapter(tmp_path / "noise", smol, rank=16)))):
        llm = engine(smol, speculative_config=isd(lora=lora, **({} if lora == adapter else {"mask_token_id": MASK})))
        stats(llm)
        assert tokens(_chat(llm, prompts, params)) == want
        found[name] = stats(llm)["tpf"]
    assert found["noise"] < 1.1 < found["trained"]
