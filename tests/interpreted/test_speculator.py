"""ISD in Model Runner V2 on a tiny model: each forward is the reference's, no event of service changes a token."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from vllm_idlm.proposers.reference import GatedLoRA, decode

from tests.support import tiny
from tests.support.engines import engine, isd, preemptions, proposer, stats, tokens
from vllm_idlm.tail import DevicePlan

pytestmark = pytest.mark.vllm
PROMPTS = [[3, 7, 11, 2], [5, 5, 9], [1, 2, 3, 4, 5, 6, 7, 8], [13], [40, 2, 40, 2, 40]]
OPTIONS = {"skip_tokenizer_init": True, "max_model_len": 128, "max_num_seqs": 3, "max_num_batched_tokens": 256}
MASK, LENGTH = 1, 26
FORMS = [(2, "last"), (4, "last"), (2, "all"), (4, "all"), (4, [2, 0])]


COVERAGES = pytest.mark.parametrize("coverage", [pytest.param("last", marks=pytest.mark.slow), "all"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("v2")
    model = tiny.write_tiny(root / "model", vocab=48)
    return str(model), str(tiny.write_adapter(root / "draft", model, scale=0.5))


def start(folders, gated, n=4, **options):
    """An engine on V2 with asynchronous scheduling."""
    settings = {"mask_token_id": MASK, **({"lora": folders[1]} if gated else {})}
    config = isd(n, **settings, **options.pop("settings", {}))
    return engine(folders[0], **OPTIONS | {"speculative_config": config, "async_scheduling": True, **options})


def plain(folders, **options):
    """An engine on V2 without ISD."""
    return engine(folders[0], **{**OPTIONS, **options})


def ask(llm, prompts, length=LENGTH, each=None):
    """Greedy answers of `length` tokens; each: options of each request."""
    from vllm import SamplingParams, TokensPrompt

    common = {"temperature": 0, "max_tokens": length, "ignore_eos": True, "detokenize": False}
    params = [SamplingParams(**{**common, **options}) for options in each or [{}] * len(prompts)]
    return llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], params, use_tqdm=False)


@pytest.mark.parametrize(
    ("n", "coverage", "gated"),
    [
        *((n, coverage, True) for n, coverage in FORMS),
        *(pytest.param(n, c, False, marks=() if (n, c) == (4, "all") else pytest.mark.slow) for n, c in FORMS),
    ],
    ids=lambda value: {True: "gated", False: "full"}[value] if isinstance(value, bool) else str(value),
)
def test_each_forward_equals_the_reference(folders, n, coverage, gated):
    """Drafts, accepted and emitted tokens, forward by forward, as far as V1 does not cut rows near the end."""
    llm = start(folders, gated, n, settings={"coverage": coverage})
    groups = coverage if isinstance(coverage, list) else range(n - 1) if coverage == "all" else ()
    config = llm.llm_engine.vllm_config
    assert config.use_v2_model_runner
    assert config.scheduler_config.async_scheduling
    llm.collective_rpc("isd_trace", args=(True,))
    stats(llm)
    outputs = ask(llm, PROMPTS)
    trace = stats(llm)["trace"]
    model = tiny.load_tiny(folders[0])
    lora = GatedLoRA(model, folders[1]) if gated else None
    accepted = 0
    for output, prompt in zip(outputs, PROMPTS, strict=True):
        want = decode(model, prompt, n=n, mask_token_id=MASK, max_tokens=LENGTH, lora=lora, groups=groups)
        got = next(t for request, t in trace.items() if request.split("-")[0] == output.request_id)
        assert list(output.outputs[0].token_ids) == want.tokens
        emitted = 1
        for ours, theirs in zip(got, want.forwards, strict=False):
            if emitted + 2 * n > LENGTH:
                break
            assert ours["drafts"] == list(theirs.drafts)
            assert ours["tokens"] == list(theirs.emitted)
            assert len(ours["drafts"]) + ours["masks"] == 2 * (n - 1)
            emitted += len(ours["tokens"])
            accepted += theirs.accepted
    assert accepted > 0, "no draft was ever accepted: the comparison saw one half of the algorithm"


def test_extra_groups_as_a_captured_graph_reads_them(folders, monkeypatch):
    """Graphs cannot be captured here. What one reads can: the tensors of a capture for the most requests, kept, while
    each step, of any number of requests, is laid out behind their addresses."""
    captured, sizes, lay = [], set(), DevicePlan.tail

    def tail(self, block_table):
        sizes.add(len(block_table))
        room = block_table._base[: OPTIONS["max_num_seqs"]]  # vLLM's own, for all steps
        if not captured:
            captured.append(self.empty(room))
        lay(self, room)
        return captured[0]

    monkeypatch.setattr(DevicePlan, "tail", tail)
    test_each_forward_equals_the_reference(folders, 4, "all", True)
    assert len(captured) == 1
    assert sizes >= {1, 2, 3}


CASES = [
    {},
    {"repetition_penalty": 1.4},
    {"presence_penalty": 1.2, "frequency_penalty": 0.7},
    {"logit_bias": {7: 4.0, 9: -50.0}},
    {"allowed_token_ids": list(range(3, 20))},
    {"min_tokens": 9, "stop_token_ids": [32, 2, 36], "ignore_eos": False},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.3, "top_k": 1, "seed": 7, "repetition_penalty": 1.2},
    {"logit_bias": {MASK: 100.0}},
    {"min_p": 0.2},
    {"logprobs": 3},
    {"logprobs": 0, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("gated", [pytest.param(False, marks=pytest.mark.slow), True], ids=["full", "gated"])
def test_options_beside_each_other(folders, gated):
    """Requests with and without options in one batch: vLLM's processing on some rows, raw logits on the others."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(CASES))]
    want = ask(plain(folders), prompts, 12, CASES)
    got = ask(start(folders, gated), prompts, 12, CASES)
    assert tokens(got) == tokens(want)
    for ours, theirs in zip(got, want, strict=True):
        _same_logprobs(ours.outputs[0].logprobs, theirs.outputs[0].logprobs)


def _same_logprobs(ours, theirs):
    assert (ours is None) == (theirs is None)
    for a, b in zip(ours or [], theirs or [], strict=True):
        assert list(a) == list(b)
        assert np.allclose([x.logprob for x in a.values()], [x.logprob for x in b.values()], atol=1e-4)


def test_processed_logprobs(folders):
    options = {"logprobs_mode": "processed_logprobs"}
    cases = [{"logprobs": 2, "repetition_penalty": 1.3}, {"logprobs": 2}, {}]
    want = ask(plain(folders, **options), PROMPTS[:3], 8, cases)
    got = ask(start(folders, True, **options), PROMPTS[:3], 8, cases)
    assert tokens(got) == tokens(want)
    for ours, theirs in zip(got, want, strict=True):
        _same_logprobs(ours.outputs[0].logprobs, theirs.outputs[0].logprobs)


@COVERAGES
def test_preemption(folders, coverage):
    """A KV cache too small for the batch: requests are preempted and resumed, also with a step in flight."""
    prompts = [p * 3 for p in PROMPTS[:4]]
    want = tokens(ask(plain(folders), prompts, 48))
    small = {"num_gpu_blocks_override": 5, "block_size": 32, "enable_prefix_caching": False}  # a block is not used
    llm = start(folders, True, disable_log_stats=False, settings={"coverage": coverage}, **small)
    preempted = preemptions(llm)
    assert tokens(ask(llm, prompts, 48)) == want
    assert preempted, "the KV cache was large enough: nothing was preempted"


@COVERAGES
def test_chunked_prompts_and_cut_rows(folders, coverage):
    """A token budget that cuts prompts and, with three requests of seven or sixteen rows, rows."""
    prompts = [p * 4 for p in PROMPTS]
    want = tokens(ask(plain(folders), prompts, 16))
    limits = {"max_num_batched_tokens": 16, "enable_prefix_caching": False}
    llm = start(folders, False, settings={"coverage": coverage}, **limits)
    assert tokens(ask(llm, prompts, 16)) == want


@COVERAGES
def test_edge_of_the_model_length(folders, coverage):
    """Rows that would reach over max_model_len."""
    short = {"max_model_len": 48}
    prompts = [(p * 12)[-30:] for p in PROMPTS]
    want = tokens(ask(plain(folders, **short), prompts, 60))
    assert {len(p) + len(t[0]) for p, t in zip(prompts, want, strict=True)} == {48}
    llm = start(folders, True, settings={"coverage": coverage}, **short)
    assert tokens(ask(llm, prompts, 60)) == want


def test_prefix_cache(folders):
    """Blocks filled by ISD's forwards serve later requests: no mask's keys or rejected draft's keys are among them."""
    prompts = [p * 10 for p in PROMPTS[:3]]
    want = tokens(ask(plain(folders), prompts, 32))
    llm = start(folders, True, block_size=32)
    first = ask(llm, prompts, 32)
    longer = [p + list(o.outputs[0].token_ids)[:24] for p, o in zip(prompts, first, strict=True)]
    again = ask(llm, longer, 8)
    assert tokens(first) == want
    assert [t[0] for t in tokens(again)] == [t[0][24:] for t in want]
    assert any(o.num_cached_tokens for o in again), "nothing came out of the prefix cache"


@COVERAGES
def test_user_adapters(folders, tmp_path, coverage):
    """A request with its own adapter: clean rows use that, mask rows the draft adapter."""
    from vllm import SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    path = folders[0]
    own = str(tiny.write_adapter(tmp_path / "own", path, seed=9, scale=1.0))
    users = {"enable_lora": True, "max_loras": 1, "max_lora_rank": 8}
    request = LoRARequest("own", 1, own)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
    prompts = [TokensPrompt(prompt_token_ids=p) for p in PROMPTS[:4]]
    # vLLM's own CPU LoRA is wrong in batches that mix requests with and without an adapter: references apart.
    with_own = tokens(plain(folders, **users).generate(prompts, params, lora_request=request, use_tqdm=False))
    without = tokens(ask(plain(folders), PROMPTS[:4], 20))
    llm = start(folders, True, settings={"coverage": coverage}, **users)
    got = tokens(llm.generate(prompts, params, lora_request=[request, None, request, None], use_tqdm=False))
    assert got == [with_own[0], without[1], with_own[2], without[3]]
    assert with_own[0] != without[0], "the user's adapter changed nothing"


def test_counters(folders):
    """vLLM's own counters see real drafts only; a cold forward is none."""
    llm = start(folders, True, disable_log_stats=False)
    stats(llm)
    before = _counters(llm)
    ask(llm, PROMPTS[:3], 30)
    counted, ours = _counters(llm), stats(llm)
    drafts = counted["vllm:spec_decode_num_draft_tokens"] - before["vllm:spec_decode_num_draft_tokens"]
    accepted = counted["vllm:spec_decode_num_accepted_tokens"] - before["vllm:spec_decode_num_accepted_tokens"]
    # Ours also counts the forwards that were in flight when their request had ended; vLLM drops those.
    slack = 3 * 3
    assert 0 < drafts <= sum(ours["drafted_per_position"]) <= drafts + slack
    assert accepted <= sum(ours["accepted_per_position"]) <= accepted + slack
    assert drafts < 3 * ours["forwards"], "cold forwards were counted"


def _counters(llm):
    return {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}


def test_proposals_are_reserved_at_start(folders, monkeypatch):
    """n - 1 rows a request, before vLLM measures memory, with a line in the log; none where drafts are argmaxes."""
    lines = []
    monkeypatch.setattr("vllm_idlm.v2.speculator.log.info", lambda text, *values: lines.append(text % values))
    kept = proposer(start(folders, False, seed=1)).proposal
    assert lines == ["ISD keeps the proposals of 3 requests in 0.0 MiB (n=4, 48 logits of float32 each)"]
    assert kept.shape == (OPTIONS["max_num_seqs"], 3, 48)
    assert proposer(start(folders, False, settings={"draft_sampling": "greedy"})).proposal is None


def test_no_step_waits_for_the_device(folders, monkeypatch):
    """No `.item()`, `.tolist()`, `.cpu()`, `.numpy()` or truth value of a tensor in our step code (kernels apart)."""
    llm = start(folders, True, settings={"coverage": "all"})
    ask(llm, PROMPTS[:3], 8)
    package = str(Path(sys.modules["vllm_idlm"].__file__).parent)
    roots = (package, str(Path(sys.modules["vllm_idlm.kernels.gate"].__file__).parents[1]))
    seen = []

    def guard(name):
        original = getattr(torch.Tensor, name)

        def checked(self, *args, **kwargs):
            for frame in reversed(traceback.extract_stack()[:-1]):
                if "/triton/runtime/" in frame.filename:
                    break  # inside the interpreter
                if frame.filename.startswith(roots):
                    # Behind vLLM's own wait, or a tensor that vLLM keeps on the host.
                    host = frame.filename.endswith("v2/output.py") or "seq_lens_cpu_upper_bound" in frame.line
                    if not host:
                        seen.append(f"{name} in {frame.filename}:{frame.lineno}")
                    break
                if "/vllm/" in frame.filename:
                    break
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, checked)

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
        guard(name)
    exec(compile("t.item()", f"{package}/v2/made_up.py", "exec"), {"t": torch.tensor(1)})
    assert seen == [f"item in {package}/v2/made_up.py:1"], "the check cannot fail"
    seen.clear()
    options = [{"temperature": 0.8, "seed": 3}, {"repetition_penalty": 1.2, "logprobs": 2}, {"temperature": 1.0}]
    ask(llm, PROMPTS[:3], 12, options)
    assert seen == []


@COVERAGES
def test_a_seeded_request_has_one_text(folders, coverage):
    """Alone, again, beside others that have slots while it has none, and with an option that vLLM's chain computes."""
    llm = start(folders, True, settings={"coverage": coverage})
    for seeded in ({"temperature": 0.9, "seed": 11}, {"temperature": 1.1, "seed": 4, "top_k": 9, "logprobs": 1}):
        alone, again = (tokens(ask(llm, PROMPTS[:1], 10, [seeded])) for _ in range(2))
        beside = tokens(ask(llm, PROMPTS[:3], 10, [seeded, {"temperature": 1.0}, {"max_tokens": 4}]))
        later = tokens(ask(llm, [*PROMPTS[1:4], PROMPTS[0]], 10, [{"max_tokens": 4}, {}, {"max_tokens": 6}, seeded]))
        assert alone == again == beside[:1] == later[3:]


def test_schedule_and_opt_out(folders):
    """A stride that falls with the number of requests, down to plain decoding, and a request that wants no ISD."""
    lengths = (9, 18, 30)
    each = [{"max_tokens": length} for length in lengths]
    each[1]["extra_args"] = {"isd": "off"}
    want = tokens(ask(plain(folders), PROMPTS[:3], each=each))
    llm = start(folders, True, settings={"schedule": [[1, 1, 4], [2, 2, 2], [3, None, 1]]})
    llm.collective_rpc("isd_trace", args=(True,))
    stats(llm)
    outputs = ask(llm, PROMPTS[:3], each=each)
    assert tokens(outputs) == want
    trace = {request.split("-")[0]: forwards for request, forwards in stats(llm)["trace"].items()}
    opted_out, other = trace[outputs[1].request_id], trace[outputs[2].request_id]
    assert all(not f["drafts"] and not f["masks"] for f in opted_out)
    assert {len(f["drafts"]) + f["masks"] for f in other} == {0, 2, 6}


def test_what_v2_refuses(folders):
    from vllm import EngineArgs

    for settings, says in (({"verify": "block"}, "standard rule alone"), ({"lossy_alpha": 0.5}, "standard rule alone")):
        asked = EngineArgs(
            folders[0], speculative_config=isd(4, mask_token_id=MASK, **settings), skip_tokenizer_init=True
        )
        with pytest.raises(ValueError, match=says):
            asked.create_engine_config()

    config = isd(4, mask_token_id=MASK)
    args = EngineArgs(folders[0], speculative_config=config, skip_tokenizer_init=True, enable_trace_replay=True)
    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        args.create_engine_config()
