"""Drafting: drafts come from the q that is handed to verification, and q is what the options say."""

from __future__ import annotations

import pytest
import torch
from vllm_idlm.kernels.draft import propose
from vllm_idlm.kernels.draft.naive import keep_top_k, keep_top_p

from tests.support.stats import chi_square

ALPHA = 0.01
SAMPLES = 200_000
MASK = 5


def _logits(rows: int, vocab: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def _noise(rows: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _sampled(rows: int) -> torch.Tensor:
    return torch.zeros(rows, dtype=torch.bool)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 1.3, "top_k": 7, "top_p": 0.9}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_drafts_follow_the_returned_q(options):
    kwargs = {name: torch.full((SAMPLES,), value) for name, value in options.items()}
    logits = _logits(1).expand(SAMPLES, -1).clone()
    proposal = propose(logits, mask_token_id=MASK, greedy=_sampled(SAMPLES), uniform=_noise(SAMPLES), **kwargs)
    q = proposal.logits[0].double().softmax(-1)
    assert torch.equal(proposal.logits, proposal.logits[:1].expand(SAMPLES, -1))
    assert chi_square(proposal.drafts.bincount(minlength=16), q).pvalue > ALPHA


def test_q_is_temperature_then_top_k_then_top_p():
    row = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2]).log()
    kwargs = {"temperature": torch.tensor([0.5]), "top_k": torch.tensor([3]), "top_p": torch.tensor([0.75])}
    q = propose(row.clone()[None], mask_token_id=2, greedy=_sampled(1), uniform=_noise(1), **kwargs).logits
    # Squared: .16 .0625 .04 lead; of these .61 .24 .15: two reach 0.75.
    expected = torch.tensor([0, 0.16, 0, 0.0625, 0]) / 0.2225
    torch.testing.assert_close(q.softmax(-1)[0], expected)


@pytest.mark.parametrize("greedy", [None, torch.tensor([True, False] * 2000)], ids=["all-greedy", "mixed"])
def test_mask_token_is_never_proposed(greedy):
    logits = _logits(4000)
    logits[:, MASK] = 50.0
    proposal = propose(logits, mask_token_id=MASK, greedy=greedy, uniform=_noise(4000))
    assert not (proposal.drafts == MASK).any()


def test_all_greedy_needs_no_noise_and_returns_one_hot():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    drafts, q = propose(logits, mask_token_id=3)
    assert drafts.tolist() == [1]  # the lowest index at a tie
    assert q is None


def test_greedy_rows_of_a_mixed_batch_take_the_argmax():
    logits, greedy = _logits(64), torch.arange(64) % 2 == 0
    expected = logits.clone().index_fill_(1, torch.tensor(MASK), -torch.inf).argmax(-1)
    temperature = torch.where(greedy, 0.0, 5.0)
    proposal = propose(logits, mask_token_id=MASK, greedy=greedy, temperature=temperature, uniform=_noise(64))
    assert torch.equal(proposal.drafts[greedy], expected[greedy])
    assert not torch.equal(proposal.drafts[~greedy], expected[~greedy])
    assert proposal.logits.isfinite().sum() == 64 * 15


def test_same_noise_same_draft_whatever_the_batch():
    logits, noise = _logits(40, 300), _noise(40)
    options = {"temperature": torch.linspace(0.5, 2, 40), "top_p": torch.linspace(0.3, 1, 40)}
    together = propose(logits.clone(), mask_token_id=MASK, greedy=_sampled(40), uniform=noise, **options)
    for i in (0, 17, 39):
        own = {name: value[i : i + 1] for name, value in options.items()}
        row, own_noise = logits[i : i + 1].clone(), noise[i : i + 1]
        alone = propose(row, mask_token_id=MASK, greedy=_sampled(1), uniform=own_noise, **own)
        assert alone.drafts[0] == together.drafts[i]
        assert torch.equal(alone.logits[0], together.logits[i])


@pytest.mark.parametrize(("mask", "uniform", "drawn"), [(0, 0.0, 1), (3, 1 - 2**-53, 2), (1, 1 / 3, 2), (1, 0.333, 0)])
def test_the_ends_of_the_noise_never_draw_an_excluded_token(mask, uniform, drawn):
    noise = torch.tensor([uniform], dtype=torch.float64)
    assert propose(torch.zeros(1, 4), mask_token_id=mask, greedy=_sampled(1), uniform=noise).drafts[0] == drawn


@pytest.mark.parametrize("k", [1, 3, 6, 0, 8, 99])
def test_top_k_keeps_ties_with_the_last(k):
    row = torch.tensor([2.0, 5.0, 1.0, 5.0, 3.0, 3.0, 3.0, 0.0])
    kept = keep_top_k(row.clone()[None], torch.tensor([k]))[0].isfinite().sum().item()
    assert kept == {1: 2, 3: 5, 6: 6, 0: 8, 8: 8, 99: 8}[k]


def _top_p_by_hand(row: torch.Tensor, p: float) -> set[int]:
    kept, total = set(), 0.0
    for token in row.argsort(descending=True).tolist():
        if kept and total >= p:
            break
        kept.add(token)
        total += float(row.double().softmax(-1)[token])
    return kept


@pytest.mark.parametrize("spread", [6.0, 1.0, 0.3], ids=["peaked", "middle", "flat"])
def test_top_p_keeps_the_fewest_that_reach_p(spread):
    """Peaked rows are settled by a few candidates, flat ones of 6000 tokens only by a full sort."""
    logits = _logits(6, 6000) / 2 * spread
    p = torch.tensor([0.01, 0.3, 0.5, 0.9, 0.97, 1.0])
    kept = keep_top_p(logits.clone(), p).isfinite()
    for row, bound, mask in zip(logits[:5], p[:5].tolist(), kept, strict=False):
        assert set(mask.nonzero().flatten().tolist()) == _top_p_by_hand(row, bound)
    assert kept[5].all()


def test_top_k_and_top_p_are_those_of_vllm():
    ops = pytest.importorskip("vllm.v1.sample.ops.topk_topp_sampler")
    logits = _logits(200, 500, seed=3)
    k = torch.arange(200) % 40 + 1
    p = torch.linspace(0.05, 1.0, 200)
    expected = ops.apply_top_k_top_p_pytorch(logits.clone(), k, p)
    assert torch.equal(keep_top_p(keep_top_k(logits.clone(), k), p), expected)


@pytest.mark.parametrize(
    ("kwargs", "names"),
    [({"mask_token_id": 16}, "mask_token_id=16"), ({"mask_token_id": -1}, "mask_token_id=-1")],
)
def test_refuses_a_mask_token_outside_the_vocabulary(kwargs, names):
    with pytest.raises(ValueError, match=names):
        propose(_logits(1), **kwargs)


def test_refuses_sampling_without_noise():
    with pytest.raises(ValueError, match="uniform=None"):
        propose(_logits(1), mask_token_id=0, greedy=_sampled(1))


def test_no_rows():
    drafts, logits = propose(_logits(0), mask_token_id=0, greedy=_sampled(0), uniform=_noise(0))
    assert drafts.shape == (0,)
    assert logits.shape == (0, 16)
