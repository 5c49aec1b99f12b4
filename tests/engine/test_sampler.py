"""Sampled output of ISD through vLLM is distributed as plain decoding's, which is enumerated exactly.

A tiny random model with a vocabulary of 8 and a draft adapter; every request answers the same prompt with 7 tokens. The
first comes without drafts (from the prompt's forward), so the joint distribution of tokens 2, 3 and 4 is tested (512
bins): Pearson's chi-square at level 0.01, with fixed seeds. Each slow test draws 200,000 answers.
"""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from tests.support import tiny
from tests.support.engines import engine, isd, proposer, stats, told
from tests.support.stats import chi_square

pytestmark = pytest.mark.vllm
VOCAB, PROMPT, MASK = 8, [3, 5, 2, 6], 0
ALPHA, FEW = 0.01, 5_000
OPTIONS = {
    "t=1": {"temperature": 1.0},
    "t=0.7": {"temperature": 0.7},
    "top-k": {"temperature": 1.0, "top_k": 4},
    "top-p": {"temperature": 0.7, "top_p": 0.8},
    "min-p": {"temperature": 1.0, "min_p": 0.1},
    "filters": {"temperature": 0.8, "top_k": 6, "top_p": 0.9, "min_p": 0.04},
    "penalties": {
        "temperature": 1.0,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.4,
        "presence_penalty": 0.3,
        "logit_bias": {4: 0.7},
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("sampled")
    model = tiny.write_tiny(root / "model", vocab=VOCAB, scale=1.2)
    return str(model), str(tiny.write_adapter(root / "draft", model, scale=0.5))


def _step(logits: torch.Tensor, answer: tuple[int, ...], options: dict) -> torch.Tensor:
    """The next token's probabilities after `answer`, by the definition of each option. logits [V] float64."""
    logits = logits.clone()
    for token, bias in options.get("logit_bias", {}).items():
        logits[token] += bias
    for token in range(VOCAB):
        if token in answer or token in PROMPT:
            r = options.get("repetition_penalty", 1.0)
            logits[token] = logits[token] / r if logits[token] > 0 else logits[token] * r
        logits[token] -= options.get("frequency_penalty", 0.0) * answer.count(token)
        logits[token] -= options.get("presence_penalty", 0.0) * (token in answer)
    logits /= options["temperature"]
    p = logits.softmax(-1)
    logits[p < options.get("min_p", 0.0) * p.max()] = -torch.inf
    if "top_k" in options:
        logits[logits < logits.topk(options["top_k"]).values[-1]] = -torch.inf
    if "top_p" in options:
        p, order = logits.softmax(-1).sort(descending=True)
        dropped = order[(p.cumsum(0) - p) >= options["top_p"]]
        logits[dropped] = -torch.inf
    return logits.softmax(-1)


@torch.inference_mode()
def _exact(model, options: dict) -> np.ndarray:
    """[V, V, V]: probabilities of answer tokens 2, 3, 4, over all answers."""
    joint = {(): 1.0}
    for length in range(4):
        answers = list(joint)
        ids = torch.tensor([[*PROMPT, *answer] for answer in answers])
        rows = torch.cat([model(input_ids=part).logits[:, -1].double() for part in ids.split(512)])
        following = {}
        for answer, row in zip(answers, rows, strict=True):
            p = _step(row, answer, options)
            following |= {(*answer, t): joint[answer] * float(p[t]) for t in range(VOCAB) if p[t] > 0}
        joint = following
        assert len(answers) <= VOCAB**length
    table = np.zeros((VOCAB,) * 3)
    for answer, p in joint.items():
        table[answer[1:]] += p
    return table


def _draw(llm, options: dict, samples: int) -> np.ndarray:
    """[V, V, V] counts of answer tokens 2, 3, 4."""
    from vllm import SamplingParams, TokensPrompt

    params = SamplingParams(max_tokens=7, ignore_eos=True, detokenize=False, **options)
    counts = np.zeros((VOCAB,) * 3)
    while samples > 0:
        batch = [TokensPrompt(prompt_token_ids=PROMPT)] * min(samples, 10_000)
        for output in llm.generate(batch, params, use_tqdm=False):
            counts[tuple(output.outputs[0].token_ids[1:4])] += 1
        samples -= len(batch)
    return counts


def _moody(policy) -> None:
    """Rows that cost little one time and much the next: strides and groups change all the time."""
    policy.cost = told(lambda rows, masked: 1 + rows * random.choice([0.0, 0.0, 0.001]))


def _pvalue(folders, options: dict, samples: int, **settings) -> float:
    path, adapter = folders
    config = isd(settings.pop("n", 4), mask_token_id=MASK, lora=adapter, **settings)
    llm = engine(path, speculative_config=config, skip_tokenizer_init=True, max_model_len=64, max_num_seqs=256, seed=1)
    torch.manual_seed(20261122)
    random.seed(1)
    if settings.get("coverage") == "auto":
        _moody(proposer(llm).policy)
    stats(llm)
    counts = _draw(llm, options, samples)
    found = stats(llm)
    assert sum(found["accepted_per_position"]) > samples / 10, "too few drafts were accepted to test anything"
    assert found["rejected"] > samples / 10
    result = chi_square(counts, _exact(tiny.load_tiny(path), options))
    found = f"chi-square {result.statistic:.1f} on {result.dof}, p {result.pvalue:.3f}"
    print(f"{options} {settings}: {samples} samples, {found}")
    return result.pvalue


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *(pytest.param(o, {}, marks=pytest.mark.slow) for o in ("t=1", "penalties")),  # t=1: in a mixed batch below
        ("filters", {"coverage": "all"}),
        ("penalties", {"coverage": "all", "verify": "block"}),
        ("t=1", {"coverage": "auto"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value.values()) or "last",
)
def test_sampled_equals_plain(folders, name, settings):
    assert _pvalue(folders, OPTIONS[name], FEW, **settings) > ALPHA


def test_a_lossy_setting_is_lossy(folders):
    """It does what it is named for: more drafts pass, and the distribution is another."""
    assert _pvalue(folders, OPTIONS["t=1"], FEW, lossy_alpha=0.6) < 1e-6
    assert _accepted(folders, lossy_alpha=0.6) > 1.1 * _accepted(folders)


def test_block_verification_is_what_verifies_where_it_was_asked_for(folders):
    """Its text is as exact; more drafts pass by it."""
    assert _accepted(folders, verify="block") > _accepted(folders)


def _accepted(folders, **settings) -> int:
    """Drafts that passed in 1,500 answers, the same random numbers for all settings."""
    path, adapter = folders
    config = isd(4, mask_token_id=MASK, lora=adapter, **settings)
    llm = engine(path, speculative_config=config, skip_tokenizer_init=True, max_model_len=64, max_num_seqs=256, seed=1)
    torch.manual_seed(3)
    stats(llm)
    _draw(llm, OPTIONS["t=1"], 1_500)
    return sum(stats(llm)["accepted_per_position"])


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_sampled_equals_plain_at_200k(folders, name):
    assert _pvalue(folders, OPTIONS[name], 200_000) > ALPHA


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"n": 2},
        {"n": 3, "draft_sampling": "greedy"},
        {"n": 8},
        {"coverage": "all"},
        {"coverage": [1], "verify": "block"},
        {"n": 3, "coverage": "all", "draft_sampling": "greedy", "verify": "block"},
    ],
    ids=str,
)
def test_other_settings_at_200k(folders, settings):
    assert _pvalue(folders, OPTIONS["t=1"], 200_000, **settings) > ALPHA


def test_a_planted_bias_is_rejected(folders, monkeypatch):
    """Argmax drafts verified with the soft q (the fault of the authors' code) must not pass the same test."""
    from vllm_idlm.v1 import proposer as module

    draw = module.draw

    def biased(*args, **kwargs):
        proposal = draw(*args, **kwargs)
        return proposal._replace(drafts=proposal.logits.argmax(-1))

    monkeypatch.setattr(module, "draw", biased)
    assert _pvalue(folders, OPTIONS["t=1"], FEW) < 1e-6


def test_greedy_and_sampled_requests_in_one_batch(folders):
    """The greedy ones answer as in plain decoding, the sampled ones pass the same test."""
    from vllm import SamplingParams, TokensPrompt

    path, adapter = folders
    base = {"skip_tokenizer_init": True, "max_model_len": 64}
    config = isd(mask_token_id=MASK, lora=adapter)
    llm = engine(path, speculative_config=config, max_num_seqs=256, seed=1, **base)
    greedy = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True, detokenize=False)
    prompt = TokensPrompt(prompt_token_ids=PROMPT)
    want = engine(path, **base).generate([prompt], greedy, use_tqdm=False)[0].outputs[0].token_ids
    sampled = SamplingParams(temperature=1.0, max_tokens=7, ignore_eos=True, detokenize=False)
    kinds = list(itertools.islice(itertools.cycle([greedy, sampled, sampled]), 6_000))
    outputs = llm.generate([prompt] * len(kinds), kinds, use_tqdm=False)
    counts = np.zeros((VOCAB,) * 3)
    for kind, output in zip(kinds, outputs, strict=True):
        if kind is greedy:
            assert output.outputs[0].token_ids == want
        else:
            counts[tuple(output.outputs[0].token_ids[1:4])] += 1
    assert chi_square(counts, _exact(tiny.load_tiny(path), OPTIONS["t=1"])).pvalue > ALPHA
    assert len(proposer(llm).records) <= 256
