"""Verification: what is emitted is distributed as p, whatever q is; a greedy request emits argmaxes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from vllm_idlm.kernels.draft import propose
from vllm_idlm.kernels.draft.naive import keep_top_k, keep_top_p
from vllm_idlm.kernels.verify import Verdict, verify

from tests.support.stats import chi_square, chi_square_rows

ALPHA = 0.01  # of statistical tests: Pearson's chi-square, with fixed seeds
SAMPLES = 200_000  # requests
VOCAB = 12
MASK = 5


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _noise(rows: int, seed: int) -> torch.Tensor:
    return torch.rand(rows, dtype=torch.float64, generator=_generator(seed))


@dataclass
class Chain:
    """A toy model: p at slot j depends on the token before it, as the anchors of a real model do.

    p [K + 1, V, V]: slot, token before (row 0 serves slot 0), next token. q [K, V]: one a slot, whatever the drafts,
    because the masks of one forward do not see each other's draws.
    """

    p: torch.Tensor
    q: torch.Tensor

    @classmethod
    def random(cls, slots: int, seed: int = 0) -> Chain:
        p = torch.randn(slots + 1, VOCAB, VOCAB, generator=_generator(seed)) * 1.5
        q = p[:-1, 0] * 0.7 + torch.randn(slots, VOCAB, generator=_generator(seed + 1))
        return cls(p, q)

    def anchors(self, drafts: torch.Tensor) -> torch.Tensor:
        """[B * (K + 1), V] logits for drafts [B, K]."""
        before = torch.cat([torch.zeros_like(drafts[:, :1]), drafts], 1)
        slots = torch.arange(self.p.shape[0]).expand_as(before)
        return self.p[slots, before].reshape(-1, VOCAB)


def _constrain(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """The request's options, on logits [.., V]."""
    flat = logits.clone().reshape(-1, logits.shape[-1]) / temperature
    if top_k is not None:
        keep_top_k(flat, torch.full((len(flat),), top_k))
    if top_p is not None:
        keep_top_p(flat, torch.full((len(flat),), top_p))
    return flat.view_as(logits)


def _sample(chain: Chain, draft: str, claim: str, options: dict, samples: int = SAMPLES) -> Verdict:
    """One forward of `samples` requests. draft: how drafts are drawn; claim: the q that verification is told."""
    slots = len(chain.q)
    rows = chain.q.repeat(samples, 1)
    filled = {name: torch.full((len(rows),), value) for name, value in options.items() if value is not None}
    sampled = torch.zeros(len(rows), dtype=torch.bool)
    soft = propose(rows, mask_token_id=MASK, greedy=sampled, uniform=_noise(len(rows), 11), **filled)
    drafts = soft.drafts if draft == "soft" else soft.logits.argmax(-1)
    chain = Chain(_constrain(chain.p, **options), chain.q)
    return verify(
        chain.anchors(drafts.view(samples, slots)),
        drafts,
        torch.full((samples,), slots),
        max_drafts=slots,
        proposal_logits=soft.logits if claim == "soft" else None,
        greedy=torch.zeros(samples, dtype=torch.bool),
        uniform=torch.rand(len(rows), dtype=torch.float64, generator=_generator(12)),
        resample=_noise(samples, 13),
    )


def _pvalues(chain: Chain, verdict: Verdict, options: dict) -> list[float]:
    """One test a slot, of the next token given the one before it; slots that 1000 requests reached."""
    p = _constrain(chain.p, **options).double().softmax(-1)
    result = []
    for slot in range(verdict.tokens.shape[1]):
        reached = verdict.tokens[:, slot] >= 0
        before = verdict.tokens[reached, slot - 1] if slot else torch.zeros(int(reached.sum()), dtype=torch.int64)
        counts = (before * VOCAB + verdict.tokens[reached, slot]).bincount(minlength=VOCAB**2).view(VOCAB, VOCAB)
        if counts.sum() >= 1000:
            result.append(chi_square_rows(counts, p[slot]).pvalue)
    return result


OPTIONS = [
    {"temperature": 1.0, "top_k": None, "top_p": None},
    {"temperature": 0.7, "top_k": None, "top_p": None},
    {"temperature": 1.0, "top_k": 4, "top_p": None},
    {"temperature": 1.0, "top_k": None, "top_p": 0.8},
    {"temperature": 1.2, "top_k": 7, "top_p": 0.9},
]


def _name(value: object) -> str:
    return "-".join(f"{k}{v}" for k, v in value.items() if v is not None) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize("draft", ["soft", "one_hot"])
@pytest.mark.parametrize("options", OPTIONS, ids=_name)
def test_emitted_tokens_are_distributed_as_p(options, draft):
    chain = Chain.random(3)
    verdict = _sample(chain, draft, draft, options)
    pvalues = _pvalues(chain, verdict, options)
    assert len(pvalues) >= 3
    # Each of the slots is a test: a level of 0.01 for all of them together.
    assert min(pvalues) > ALPHA / len(pvalues)


@pytest.mark.parametrize("options", OPTIONS[:2], ids=_name)
def test_argmax_drafts_verified_with_soft_q_are_rejected_by_the_same_test(options):
    """The bias of the authors' code: the test above has to have the power to see it."""
    chain = Chain.random(3)
    pvalues = _pvalues(chain, _sample(chain, "one_hot", "soft", options), options)
    assert min(pvalues) < 1e-6


def test_shared_noise_is_rejected_by_the_same_test():
    """Resampling with the noise that drew the draft is biased: the streams have to be independent."""
    p, q = torch.randn(2, VOCAB, generator=_generator(3)).unbind()
    noise, sampled = _noise(SAMPLES, 4), torch.zeros(SAMPLES, dtype=torch.bool)
    soft = propose(q.repeat(SAMPLES, 1), mask_token_id=MASK, greedy=sampled, uniform=noise)
    uniform = torch.rand(SAMPLES, dtype=torch.float64, generator=_generator(5))
    pvalues = []
    for resample in (noise, _noise(SAMPLES, 6)):
        verdict = verify(
            p.repeat(2 * SAMPLES, 1),
            soft.drafts,
            torch.ones(SAMPLES, dtype=torch.int64),
            max_drafts=1,
            proposal_logits=soft.logits,
            greedy=sampled,
            uniform=uniform,
            resample=resample,
        )
        counts = verdict.tokens[:, 0].bincount(minlength=VOCAB)
        pvalues.append(chi_square(counts, p.softmax(-1)).pvalue)
    assert pvalues[0] < 1e-6
    assert pvalues[1] > ALPHA


def test_acceptance_and_residual_are_exact():
    """Over a fine grid of uniforms every draft is accepted in exactly min(1, p/q) of the cases, else never emitted."""
    p = torch.tensor([0.5, 0.2, 0.2, 0.1, 0.0])
    q = torch.tensor([0.25, 0.5, 0.2, 0.0, 0.05])
    grid = 1000
    for draft, rate in [(0, 1.0), (1, 0.4), (2, 1.0), (4, 0.0)]:
        verdict = verify(
            p.log().repeat(2 * grid, 1),
            torch.full((grid,), draft),
            torch.ones(grid, dtype=torch.int64),
            max_drafts=1,
            proposal_logits=q.log().repeat(grid, 1),
            greedy=torch.zeros(grid, dtype=torch.bool),
            uniform=(torch.arange(grid, dtype=torch.float64) + 0.5) / grid,
            resample=_noise(grid, 7),
        )
        assert verdict.accepted.sum() == rate * grid
        rejected = verdict.tokens[verdict.accepted == 0]
        assert set(rejected[:, 0].tolist()) <= {0, 3}  # max(p - q, 0) is 0.25 at 0 and 0.1 at 3
        assert (rejected[:, 1] == -1).all()
        assert not (verdict.tokens == 4).any()


def _mixed(seed: int = 0, batch: int = 256, slots: int = 4, vocab: int = 30) -> dict:
    """A batch with 0..slots drafts a request, with noise, some greedy requests and some one-hot proposals."""
    g = _generator(seed)
    counts = torch.randint(0, slots + 1, (batch,), generator=g)
    total = int(counts.sum())
    q = torch.randn(total, vocab, generator=g)
    logits = torch.randn(total + batch, vocab, generator=g)
    owner = torch.arange(batch).repeat_interleave(counts)
    row = torch.arange(total) + owner
    logits[row] = q * 1.5 + logits[row] * 0.5
    one_hot = torch.rand(total, generator=g) < 0.5
    drawn = q.softmax(-1).multinomial(1, generator=g).squeeze(1)
    return {
        "logits": logits,
        "drafts": torch.where(one_hot, q.argmax(-1), drawn),
        "num_drafts": counts,
        "max_drafts": slots,
        "proposal_logits": q,
        "one_hot": one_hot,
        "greedy": torch.arange(batch) % 3 == 0,
        "uniform": torch.rand(total, dtype=torch.float64, generator=g),
        "resample": _noise(batch, seed + 1),
    }


def _by_hand(case: dict) -> list[list[int]]:
    """The rule, request by request, with the same noise; in float64."""
    result, row, d = [], 0, 0
    for b, k in enumerate(case["num_drafts"].tolist()):
        emitted, weights = [], None
        for i in range(k):
            p = case["logits"][row + i].double().softmax(-1)
            q = case["proposal_logits"][d + i].double().softmax(-1)
            draft = int(case["drafts"][d + i])
            if case["greedy"][b]:
                p = torch.zeros_like(p).index_fill_(0, p.argmax(), 1.0)
            if case["greedy"][b] or case["one_hot"][d + i]:
                q = torch.zeros_like(q).index_fill_(0, torch.tensor(draft), 1.0)
            if case["uniform"][d + i] >= p[draft] / q[draft]:
                weights = (p - q).clamp(min=0)
                break
            emitted.append(draft)
        if weights is None:
            weights = case["logits"][row + k].double().softmax(-1)
            if case["greedy"][b]:
                weights = torch.zeros_like(weights).index_fill_(0, weights.argmax(), 1.0)
        result.append([*emitted, _drawn(weights, float(case["resample"][b]))])
        row, d = row + k + 1, d + k
    return result


def _drawn(weights: torch.Tensor, uniform: float) -> int:
    """The index at `uniform` of the cumulative weights, one by one."""
    target, total = uniform * float(weights.sum()), 0.0
    for index, weight in enumerate(weights.tolist()):
        total += weight
        if total > target:
            return index
    raise AssertionError("no weight")


def _lists(verdict: Verdict) -> list[list[int]]:
    return [[t for t in row if t >= 0] for row in verdict.tokens.tolist()]


@pytest.mark.parametrize("seed", range(5))
def test_mixed_batch_equals_the_rule_by_hand(seed):
    case = _mixed(seed)
    verdict = verify(**case)
    assert _lists(verdict) == _by_hand(case)
    assert verdict.accepted.tolist() == [len(row) - 1 for row in _lists(verdict)]
    assert verdict.tokens.dtype == verdict.accepted.dtype == torch.int64
    assert set(verdict.accepted.tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("vocab", [30, 700_000], ids=["one-piece", "row-by-row"])
def test_a_verdict_does_not_depend_on_the_rest_of_the_batch(vocab):
    case = _mixed(1, batch=8, vocab=vocab)
    together = _lists(verify(**case))
    rows = (case["num_drafts"] + 1).tolist()
    per_draft = ["drafts", "proposal_logits", "one_hot", "uniform"]
    pieces = {name: case[name].split(case["num_drafts"].tolist()) for name in per_draft}
    logits = case["logits"].split(rows)
    for b in range(8):
        own = {name: piece[b] for name, piece in pieces.items()}
        own |= {name: case[name][b : b + 1] for name in ("num_drafts", "greedy", "resample")}
        assert _lists(verify(logits=logits[b], max_drafts=4, **own)) == together[b : b + 1]


def test_inputs_are_not_changed():
    case = _mixed(2)
    before = {name: x.clone() for name, x in case.items() if isinstance(x, torch.Tensor)}
    verify(**case)
    assert all(torch.equal(case[name], x) for name, x in before.items())


def test_greedy_needs_no_noise_and_a_tie_goes_to_the_lowest_index():
    logits = torch.tensor([[0.0, 2.0, 2.0], [1.0, 0.0, 1.0], [0.0, 0.0, 5.0], [3.0, 0.0, 0.0]])
    verdict = verify(logits, torch.tensor([1, 2]), torch.tensor([2, 0]), max_drafts=2)
    assert verdict.tokens.tolist() == [[1, 0, -1], [0, -1, -1]]
    assert verdict.accepted.tolist() == [1, 0]


def test_no_drafts_at_all():
    logits = torch.randn(3, VOCAB, generator=_generator(0))
    none = torch.zeros(0, dtype=torch.int64)
    zero = torch.zeros(3, dtype=torch.int64)
    assert verify(logits, none, zero, max_drafts=0).tokens.tolist() == logits.argmax(-1, keepdim=True).tolist()
    noise = _noise(3, 1)
    sampled = torch.zeros(3, dtype=torch.bool)
    uniform = torch.zeros(0, dtype=torch.float64)
    verdict = verify(logits, none, zero, max_drafts=2, greedy=sampled, uniform=uniform, resample=noise)
    drawn = [_drawn(row, float(u)) for row, u in zip(logits.softmax(-1), noise, strict=True)]
    assert verdict.tokens[:, 0].tolist() == drawn
    assert (verdict.tokens[:, 1:] == -1).all()


def test_equal_p_and_q_always_accept():
    """Also at the greatest uniform below 1, with excluded tokens, and with an extreme p."""
    logits = torch.randn(1000, VOCAB, generator=_generator(0)) * 20
    logits[:, 3] = -torch.inf
    drafts = logits.softmax(-1).multinomial(1, generator=_generator(1)).squeeze(1)
    verdict = verify(
        torch.stack([logits, logits], 1).reshape(-1, VOCAB),
        drafts,
        torch.ones(1000, dtype=torch.int64),
        max_drafts=1,
        proposal_logits=logits,
        greedy=torch.zeros(1000, dtype=torch.bool),
        uniform=torch.full((1000,), 1 - 2.0**-53, dtype=torch.float64),
        resample=_noise(1000, 2),
    )
    assert (verdict.accepted == 1).all()


@pytest.mark.parametrize("uniform", [0.0, 0.5])
def test_a_draft_that_p_excludes_is_never_accepted(uniform):
    """p(d) = 0: not at uniform 0, not where q(d) rounds to 0 as well."""
    p = torch.tensor([0.0, -torch.inf, 0.0])
    q = torch.tensor([[0.0, 50.0, 0.0], [200.0, -200.0, 0.0], [0.0, -torch.inf, 0.0]])
    verdict = verify(
        p.repeat(6, 1),
        torch.ones(3, dtype=torch.int64),
        torch.ones(3, dtype=torch.int64),
        max_drafts=1,
        proposal_logits=q,
        greedy=torch.zeros(3, dtype=torch.bool),
        uniform=torch.full((3,), uniform, dtype=torch.float64),
        resample=_noise(3, 1),
    )
    assert (verdict.accepted == 0).all()
    assert not (verdict.tokens == 1).any()


def test_an_empty_residual_falls_back_to_p():
    """p = q up to rounding and yet a rejection: what is emitted must still have p > 0."""
    p = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    verdict = verify(
        p.repeat(2, 1),
        torch.tensor([1]),
        torch.tensor([1]),
        max_drafts=1,
        proposal_logits=p,
        greedy=torch.tensor([False]),
        uniform=torch.tensor([1.0], dtype=torch.float64),  # outside of [0, 1), to force the rejection
        resample=torch.tensor([0.5], dtype=torch.float64),
    )
    assert verdict.tokens.tolist() == [[1, -1]]


def test_p_may_emit_the_mask_token():
    """The mask token is banned from q only."""
    logits = torch.zeros(2, VOCAB)
    logits[:, MASK] = 50.0
    drafts = propose(logits[:1].clone(), mask_token_id=MASK).drafts
    assert drafts.item() != MASK
    assert verify(logits, drafts, torch.tensor([1]), max_drafts=1).tokens.tolist() == [[MASK, -1]]
    assert verify(logits, torch.tensor([MASK]), torch.tensor([1]), max_drafts=1).tokens.tolist() == [[MASK, MASK]]


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"logits": torch.zeros(7, 30)}, "logits has 7 rows"),
        ({"max_drafts": 0}, "max_drafts=0"),
        ({"proposal_logits": torch.zeros(1, 30)}, "proposal_logits has shape"),
        ({"uniform": None}, "uniform and resample"),
        ({"resample": None}, "uniform and resample"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses_what_does_not_fit(change, names):
    with pytest.raises(ValueError, match=names):
        verify(**(_mixed(0) | change))
