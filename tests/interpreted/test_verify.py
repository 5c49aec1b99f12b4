"""The Triton kernels of verification against their plain torch form, and both against the distribution they promise."""

from __future__ import annotations

import pytest
import torch
from vllm_idlm.kernels.draft.rows import MaskRows, draft_rows
from vllm_idlm.kernels.noise import ACCEPT, naive
from vllm_idlm.kernels.verify import rows as oracle
from vllm_idlm.kernels.verify import triton as kernel
from vllm_idlm.kernels.verify.rows import Rows

from tests.support.stats import chi_square

SLOTS = 70


def make(batch=3, most=3, vocabulary=100, dtype=torch.float32, seed=0, one_hot=False, processed=False, greedy=None):
    """Random rows of `batch` requests in scattered slots, with ragged drafts; drafts are drawn near q's top."""
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, most + 1, (batch,), generator=g)
    first = torch.arange(batch) * (2 * most + 1)
    logits = (torch.randn(batch * (2 * most + 1), vocabulary, generator=g) * 2).to(dtype)
    slot = torch.randperm(SLOTS, generator=g)[:batch]
    proposal = (torch.randn(SLOTS, most, vocabulary, generator=g) * 2).to(dtype)
    for b in range(batch):  # q near p, so that some drafts pass
        rows = logits[first[b] : first[b] + most].float()
        proposal[slot[b]] = (rows + 0.5 * torch.randn(rows.shape, generator=g)).to(dtype)
    temperature = torch.rand(SLOTS, generator=g) + 0.5
    if greedy is not None:
        temperature[slot] = torch.where(torch.tensor([greedy(b) for b in range(batch)]), 0.0, temperature[slot])
    drafts = proposal[slot].float().softmax(-1).view(-1, vocabulary).multinomial(1, generator=g).view(batch, most)
    best = torch.stack([logits[first + j].float().argmax(-1) for j in range(most)], 1)
    drafts = torch.where(temperature[slot].unsqueeze(1) == 0, best.where(drafts % 3 > 0, drafts), drafts)
    made, made_first = None, None
    if processed:
        made_first = torch.where(torch.arange(batch) % 2 == 0, torch.arange(batch) // 2 * (most + 1), -1)
        made = torch.randn(((batch + 1) // 2) * (most + 1), vocabulary, generator=g) * 2
    seeds = torch.randint(-(2**62), 2**62, (SLOTS,), generator=g)
    positions = torch.randint(0, 40_000, (batch,), generator=g)
    return Rows(
        logits, first, counts, drafts.contiguous(), positions, slot, temperature, seeds,
        None if one_hot else proposal, made, made_first,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("batch", "most", "vocabulary", "dtype"),
    [
        (1, 1, 64, torch.float32),
        (3, 3, 1000, torch.bfloat16),
        (2, 15, 8192, torch.float32),
        (3, 3, 8193, torch.float16),
        (24, 2, 257, torch.float32),
        (2, 3, 49_152, torch.bfloat16),
        (2, 3, 151_936, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("kind", ["soft", "one-hot", "processed", "greedy", "mixed"])
def test_equals_the_oracle(batch, most, vocabulary, dtype, kind):
    greedy = {"greedy": lambda b: True, "mixed": lambda b: b % 2 == 0}.get(kind)
    rows = make(batch, most, vocabulary, dtype, 7, kind == "one-hot", kind in ("processed", "mixed"), greedy)
    wanted, found = oracle.verify_rows(rows), kernel.verify_rows(rows)
    assert torch.equal(found.emitted, wanted.emitted)
    assert torch.equal(found.tokens, wanted.tokens)


def test_extreme_rows():
    """-inf, NaN, ties, one-hot rows, p equal to q: the same verdict as the oracle's, and always a token."""
    rows = make(8, 3, 500, seed=3)
    logits, proposal = rows.logits.clone(), rows.proposal.clone()
    first, slot = rows.first_row, rows.slot
    logits[first[0]] = float("-inf")
    logits[first[1], ::3] = float("nan")
    logits[first[2]] = 1.0
    logits[first[3] : first[3] + 4] = float("-inf")
    logits[first[3] : first[3] + 4, 17] = 0.0
    proposal[slot[4]] = logits[first[4] : first[4] + 3]
    proposal[slot[5]] = float("nan")
    logits[first[6], 3:] = float("-inf")
    rows = rows._replace(logits=logits, proposal=proposal, num_drafts=torch.tensor([3, 3, 3, 3, 3, 3, 3, 0]))
    rows.drafts[3, 0] = 17
    for temperature in (0.0, 1.0):
        given = rows._replace(temperature=torch.full((SLOTS,), temperature))
        wanted, found = oracle.verify_rows(given), kernel.verify_rows(given)
        assert torch.equal(found.tokens, wanted.tokens)
        emitted = found.tokens.gather(1, found.emitted.long().unsqueeze(1) - 1)
        assert ((emitted >= 0) & (emitted < 500)).all()
    assert found.tokens[3, 0] == 17  # p is one-hot at the draft: accepted
    assert found.emitted[4] == 4  # p = q: everything passes


def test_a_tie_goes_to_the_first_token_of_all_blocks(monkeypatch):
    """Ties are common in bfloat16; a block of the vocabulary knows its own best alone."""
    monkeypatch.setattr(kernel, "STATS_BLOCK", 64)
    monkeypatch.setattr(kernel, "RACE_BLOCK", 64)
    rows = make(3, 2, 300, greedy=lambda b: True)._replace(num_drafts=torch.zeros(3, dtype=torch.int64))
    rows.logits[:] = 0.0
    rows.logits[:, [70, 75, 200, 299]] = 1.0
    for run in (oracle.verify_rows, kernel.verify_rows):
        assert run(rows).tokens[:, 0].tolist() == [70] * 3


def test_what_is_drafted_and_verified_is_distributed_as_p():
    """The whole chain by one seed: noise of drafts that told of the noise of acceptance would show."""
    samples, vocabulary = 60_000, 8
    g = torch.Generator().manual_seed(11)
    q, p = torch.randn(1, vocabulary, generator=g) * 1.5, torch.randn(2, vocabulary, generator=g) * 1.5
    each, ones = torch.arange(samples), torch.ones(samples, dtype=torch.int64)
    temperature, seeds = torch.full((samples,), 0.8), each * 7919
    drafts, kept = torch.empty(samples, 1, dtype=torch.int64), torch.zeros(samples, 1, vocabulary)
    rows = MaskRows(q.expand(samples, -1), each, ones, ones * 9, each, temperature, seeds, vocabulary - 1)
    draft_rows(rows, drafts, kept)
    verified = Rows(p.repeat(samples, 1), each * 2, ones, drafts, ones * 9, each, temperature, seeds, kept)
    tokens = oracle.verify_rows(verified).tokens
    target = (p / 0.8).softmax(-1)
    assert chi_square(torch.bincount(tokens[:, 0], minlength=vocabulary), target[0]).pvalue > 1e-3
    second = tokens[tokens[:, 1] >= 0, 1]
    assert len(second) > samples / 10
    assert chi_square(torch.bincount(second, minlength=vocabulary), target[1]).pvalue > 1e-3


def draws(run, samples, one_hot=False, seed=0):
    """First tokens of `samples` requests with one draft each, drawn from q, all of the same p, q; and p."""
    g = torch.Generator().manual_seed(seed)
    vocabulary = 12
    logits = torch.randn(2, vocabulary, generator=g) * 1.5
    q = torch.randn(vocabulary, generator=g) * 1.5
    temperature = 0.8
    drafts = (q / temperature).softmax(-1).multinomial(samples, replacement=True, generator=g).unsqueeze(1)
    if one_hot:
        drafts[:] = q.argmax()
    rows = Rows(
        logits.repeat(samples, 1),
        torch.arange(samples) * 2,
        torch.ones(samples, dtype=torch.int64),
        drafts,
        torch.randint(0, 30_000, (samples,), generator=g),
        torch.arange(samples),
        torch.full((samples,), temperature),
        torch.randint(-(2**62), 2**62, (samples,), generator=g),
        None if one_hot else q.view(1, 1, -1).expand(samples, 1, -1),
    )
    return run(rows).tokens, (logits / temperature).softmax(-1)


@pytest.mark.parametrize("one_hot", [False, True])
def test_the_oracle_emits_p(one_hot):
    tokens, p = draws(oracle.verify_rows, 200_000, one_hot)
    assert chi_square(torch.bincount(tokens[:, 0], minlength=12), p[0]).pvalue > 1e-3
    second = tokens[tokens[:, 1] >= 0, 1]
    assert chi_square(torch.bincount(second, minlength=12), p[1]).pvalue > 1e-3


def test_the_kernel_emits_p():
    """Fewer samples: the interpreter runs some 16 requests a second. Its tokens equal the oracle's anyway."""
    tokens, p = draws(kernel.verify_rows, 200, seed=5)
    assert torch.equal(tokens, draws(oracle.verify_rows, 200, seed=5)[0])
    assert chi_square(torch.bincount(tokens[:, 0], minlength=12), p[0]).pvalue > 1e-3


def test_streams_are_uncorrelated():
    """Uniforms of the three streams, of neighbouring places and of neighbouring seeds."""
    seed, place = torch.arange(200).view(-1, 1), torch.arange(1000).view(1, -1)
    zero = torch.zeros(1, 1)
    streams = [naive.uniform(seed, zero, place, stream).flatten() for stream in (1, 2, 3)]
    streams += [
        naive.uniform(seed, zero, place + 1, ACCEPT).flatten(),
        naive.uniform(seed + 1, zero, place, 1).flatten(),
    ]
    table = torch.corrcoef(torch.stack(streams)) - torch.eye(5)
    assert table.abs().max() < 4.5 * 200_000**-0.5
    for one in streams:
        assert chi_square(torch.histc(one, 64, 0, 1), torch.full((64,), 1 / 64)).pvalue > 1e-4


def test_philox_is_philox():
    """The known answer of Random123 for counter 0 and key 0, first word."""
    zero = torch.tensor(0)
    assert int(naive.philox(zero, zero, zero, 0)) == 0x6627E8D5
