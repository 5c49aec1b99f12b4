"""Sampled output of Model Runner V2 with ISD is distributed as plain decoding's, which is enumerated exactly.

The model, the options and the method are those of tests/engine/test_sampler.py; the interpreter draws some tens of
tokens a second, so the samples are fewer here, and given a prefix the tests are of the next token.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.engine.test_sampler import MASK, OPTIONS, PROMPT, VOCAB, _step
from tests.interpreted.test_pace import any_width
from tests.support import tiny
from tests.support.engines import engine, isd, stats
from tests.support.stats import chi_square_rows

pytestmark = pytest.mark.vllm
SAMPLES, LENGTH = 120, 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("v2_sampled")
    model = tiny.write_tiny(root / "model", vocab=VOCAB, scale=1.2)
    return str(model), str(tiny.write_adapter(root / "draft", model, scale=0.5))


@pytest.mark.parametrize(
    ("options", "drafts", "coverage"),
    [
        ("penalties", "greedy", "last"),
        ("t=0.7", "probabilistic", "auto"),  # rows of any width, all groups among them
        pytest.param("t=1", "probabilistic", "all", marks=pytest.mark.slow),
        *(
            pytest.param(o, "probabilistic", "last", marks=pytest.mark.slow)
            for o in ("t=0.7", "t=1", "top-k", "top-p", "min-p", "penalties")
        ),
        *(pytest.param(o, "greedy", "all", marks=pytest.mark.slow) for o in ("t=0.7", "top-p")),
    ],
)
def test_next_tokens(folders, options, drafts, coverage, monkeypatch):
    """Every token from the third on (the first that a draft can be), given the answer before it.

    auto: rows of a random width every step; without seeds, which would keep the width.
    """
    from vllm import SamplingParams, TokensPrompt

    path, adapter = folders
    config = isd(3, mask_token_id=MASK, lora=adapter, draft_sampling=drafts, coverage=coverage)
    sizes = {"max_model_len": 64, "max_num_seqs": 24, "max_num_batched_tokens": 256, "skip_tokenizer_init": True}
    llm = engine(path, speculative_config=config, async_scheduling=True, **sizes)
    stats(llm)
    if coverage == "auto":
        any_width(monkeypatch)
    params = [
        SamplingParams(max_tokens=LENGTH, ignore_eos=True, detokenize=False, seed=seed, **OPTIONS[options])
        for seed in ([None] * SAMPLES if coverage == "auto" else range(SAMPLES))
    ]
    outputs = llm.generate([TokensPrompt(prompt_token_ids=PROMPT)] * SAMPLES, params, use_tqdm=False)
    assert sum(stats(llm)["accepted_per_position"]) > SAMPLES / 10, "too few drafts were accepted to tell"
    model = tiny.load_tiny(path)
    counts, wanted = np.zeros((LENGTH, VOCAB)), np.zeros((LENGTH, VOCAB))
    answers = np.array([list(o.outputs[0].token_ids) for o in outputs])
    with torch.no_grad():
        logits = model(torch.cat([torch.tensor([PROMPT] * SAMPLES), torch.tensor(answers)], 1)).logits.double()
    for answer, rows in zip(answers.tolist(), logits[:, len(PROMPT) - 1 :], strict=True):
        for place in range(2, LENGTH):
            wanted[place] += _step(rows[place], tuple(answer[:place]), OPTIONS[options]).numpy()
            counts[place, answer[place]] += 1
    assert chi_square_rows(counts[1:], wanted[1:]).pvalue > 1e-3
