"""A thinking budget over verified rows forces the same tokens as plain decoding, one token a step, would."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
START, END, VOCAB = [1], [2, 3], 8


def _holder(spec_tokens):
    from vllm.v1.sample.logits_processor.interface import BatchUpdate
    from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

    config = SimpleNamespace(reasoning_start_token_ids=START, reasoning_end_token_ids=END)
    holder = ThinkingBudgetStateHolder(config, 4, spec_tokens, torch.device("cpu"), False)

    def add(prompt, output, budget):
        params = SimpleNamespace(thinking_token_budget=budget)
        holder.sync_batch(BatchUpdate(batch_size=1, removed=[], added=[(0, params, prompt, output)], moved=[]))

    return holder, add


def _plain(prompt, budget, tokens):
    """What plain decoding may emit at each step: the model wants `tokens`, the budget may force others. Greedy."""
    holder, add = _holder(0)
    output: list[int] = []
    add(prompt, output, budget)
    for wanted in tokens:
        logits = torch.zeros(1, VOCAB).index_fill_(1, torch.tensor(wanted), 5.0)
        holder.update_state([output], None)
        output.append(int(holder.apply_to_logits(logits, False, None).argmax()))
    return output


def _strided(prompt, budget, tokens, n, seed):
    """The same through verify forwards with drafts that are sometimes right."""
    from vllm_idlm.v1.options import Rows
    from vllm_idlm.v1.thinking import thinking_rows

    holder, add = _holder(2 * (n - 1))
    output: list[int] = []
    add(prompt, output, budget)
    rng = random.Random(seed)
    while len(output) < len(tokens):
        ahead = tokens[len(output) :]
        drafts = [t if rng.random() < 0.7 else rng.randrange(4, VOCAB) for t in ahead[: rng.randrange(n)]]
        rows = Rows([drafts], torch.device("cpu"))
        sampling = SimpleNamespace(thinking_budget_state_holder=holder, output_token_ids=[output])
        logits = torch.zeros(len(drafts) + 1, VOCAB)
        for place in range(len(drafts) + 1):
            logits[place, ahead[min(place, len(ahead) - 1)]] = 5.0
        best = thinking_rows(sampling, rows).apply_to_logits(logits, False, None).argmax(-1).tolist()
        accepted = next((i for i, d in enumerate(drafts) if d != best[i]), len(drafts))
        output.extend(best[: accepted + 1])
        output[:] = output[: len(tokens)]
    return output


@pytest.mark.parametrize("budget", [0, 1, 3, 7, 40])
@pytest.mark.parametrize("thinking", ["in-prompt", "in-answer", "none"])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_budget_equals_plain(budget, thinking, n):
    prompt = [5, 6, *(START if thinking == "in-prompt" else [])]
    tokens = [*([4, *START] if thinking == "in-answer" else []), *([4, 5, 6, 7] * 5)]
    want = _plain(prompt, budget, tokens)
    if thinking != "none" and budget < 20:
        assert END[0] in want, "the budget forced nothing"
    for seed in range(5):
        assert _strided(prompt, budget, tokens, n, seed) == want
