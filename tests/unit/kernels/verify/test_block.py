"""Block verification: the text is distributed as the target, and no fewer drafts pass than by the standard rule."""

from __future__ import annotations

import pytest
import torch
from vllm_idlm.kernels.verify import verify
from vllm_idlm.kernels.verify.block import verify as verify_block

from tests.support.stats import chi_square

V, K, B = 4, 3, 200_000


def tables(seed: int, sharp: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    """p of a token by place and the token before [K + 1, V, V], and q by place [K, V], as logits."""
    draw = torch.Generator().manual_seed(seed)
    return (
        torch.randn(K + 1, V, V, generator=draw) * sharp,
        torch.randn(K, V, generator=draw) * sharp,
    )


def run(rule, p, q, k, greedy_drafts=False, seed=0, batch=B):
    """Rows of k drafts behind token 0, verified, and finished with tokens drawn from p: [batch, K + 1], accepted."""
    draw = torch.Generator().manual_seed(seed)
    if greedy_drafts:
        drafts = q.argmax(-1)[:k].expand(batch, k)
    else:
        drafts = torch.multinomial(q.softmax(-1)[:k], batch, replacement=True, generator=draw).T
    before = torch.cat([torch.zeros(batch, 1, dtype=torch.int64), drafts], 1)
    logits = torch.stack([p[i, before[:, i]] for i in range(k + 1)], 1).flatten(0, 1)
    own = None if greedy_drafts else q[:k].expand(batch, k, V).reshape(-1, V)
    noise = torch.rand(batch, k + 1, generator=draw, dtype=torch.float64)
    verdict = rule(
        logits, drafts.flatten(), torch.full((batch,), k), max_drafts=k, proposal_logits=own,
        greedy=torch.zeros(batch, dtype=torch.bool), uniform=noise[:, :k].flatten(), resample=noise[:, k].clone(),
    )  # fmt: skip
    tokens = torch.full((batch, K + 1), -1)
    tokens[:, : k + 1] = verdict.tokens
    for place in range(1, K + 1):
        last = p[place, tokens[:, place - 1].clamp(min=0)].softmax(-1)
        made = torch.multinomial(last, 1, generator=draw).squeeze(1)
        tokens[:, place] = torch.where(tokens[:, place] < 0, made, tokens[:, place])
    return tokens, verdict.accepted


def exact(p) -> torch.Tensor:
    """The distribution of the K + 1 tokens, [V ** (K + 1)]."""
    found = p[0, 0].softmax(-1)
    for place in range(1, K + 1):
        found = found.unsqueeze(-1) * p[place].softmax(-1)
    return found.flatten()


def counts(tokens) -> torch.Tensor:
    index = sum(tokens[:, i] * V ** (K - i) for i in range(K + 1))
    return torch.bincount(index, minlength=V ** (K + 1))


@pytest.mark.parametrize("greedy_drafts", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_text_is_distributed_as_the_target(seed, k, greedy_drafts):
    p, q = tables(seed)
    tokens, accepted = run(verify_block, p, q, k, greedy_drafts)
    assert chi_square(counts(tokens), exact(p)).pvalue > 1e-3
    assert 0 < accepted.double().mean() < k


def test_a_target_that_is_a_little_off_is_found():
    p, q = tables(0)
    tokens, _ = run(verify_block, p, q, 3)
    shifted = exact(p + torch.tensor([0.1, 0, 0, 0]))
    assert chi_square(counts(tokens), shifted).pvalue < 1e-6


@pytest.mark.parametrize("seed", range(6))
def test_no_fewer_drafts_are_accepted(seed):
    p, q = tables(seed, 1.0)
    block = run(verify_block, p, q, 3)[1].double().mean()
    standard = run(verify, p, q, 3)[1].double().mean()
    assert block > standard - 0.01


def test_one_draft_is_the_standard_rule():
    p, q = tables(3)
    for greedy_drafts in (False, True):
        block, standard = (run(rule, p, q, 1, greedy_drafts, batch=5000) for rule in (verify_block, verify))
        assert torch.equal(block[1], standard[1])
        assert torch.equal(block[0][:, 0], standard[0][:, 0])


def test_a_mixed_batch_is_each_of_its_requests():
    """Ragged rows, greedy requests and one-hot proposals in one batch: as verified alone."""
    draw = torch.Generator().manual_seed(5)
    num = torch.tensor([0, 3, 1, 2, 3])
    total, rows = int(num.sum()), int(num.sum()) + len(num)
    logits, own = torch.randn(rows, 9, generator=draw), torch.randn(total, 9, generator=draw)
    drafts = torch.randint(9, (total,), generator=draw)
    noise = torch.rand(total + len(num), generator=draw, dtype=torch.float64)
    greedy = torch.tensor([False, False, True, False, False])
    one_hot = torch.tensor([i >= 6 for i in range(total)])
    whole = verify_block(
        logits, drafts, num, max_drafts=3, proposal_logits=own, one_hot=one_hot, greedy=greedy,
        uniform=noise[:total], resample=noise[total:],
    )  # fmt: skip
    first = 0
    for i, k in enumerate(num.tolist()):
        part = slice(first, first + k)
        alone = verify_block(
            logits[first + i : first + i + k + 1], drafts[part], num[i : i + 1], max_drafts=3,
            proposal_logits=own[part], one_hot=one_hot[part], greedy=greedy[i : i + 1], uniform=noise[part],
            resample=noise[total + i : total + i + 1],
        )  # fmt: skip
        assert torch.equal(whole.tokens[i], alone.tokens[0])
        first += k


def test_p_equal_to_q_accepts_everything():
    p, _ = tables(0)
    same = p[:K, 0]
    tokens = torch.zeros(K + 1, V, V) + torch.cat([same, same[:1]]).unsqueeze(1)
    assert run(verify_block, tokens, same, 3, batch=2000)[1].eq(3).all()
