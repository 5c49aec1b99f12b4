"""The Triton kernels of drafting and of the adapter gate against their plain torch forms, and the LoRA metadata."""

from __future__ import annotations

import pytest
import torch
from vllm_idlm.kernels.draft import rows as draft_oracle
from vllm_idlm.kernels.draft import triton as draft_kernel
from vllm_idlm.kernels.draft.rows import MaskRows
from vllm_idlm.kernels.gate import Batch, Gate
from vllm_idlm.kernels.gate import naive as gate_oracle
from vllm_idlm.kernels.gate import triton as gate_kernel

from tests.support.stats import chi_square

SLOTS, MASK = 70, 5


def mask_rows(batch, most, vocabulary, dtype, greedy=lambda b: False, seed=0):
    g = torch.Generator().manual_seed(seed)
    count = torch.randint(0, most + 1, (batch,), generator=g)
    temperature = torch.rand(SLOTS, generator=g) + 0.5
    slot = torch.randperm(SLOTS, generator=g)[:batch]
    temperature[slot] = torch.where(torch.tensor([greedy(b) for b in range(batch)]), 0.0, temperature[slot])
    logits = (torch.randn(batch * most + 3, vocabulary, generator=g) * 3).to(dtype)
    logits[:, MASK] = 30.0  # the mask token is the likeliest everywhere, and banned
    return MaskRows(
        logits, torch.arange(batch) * most + 1, count, torch.randint(0, 40_000, (batch,), generator=g), slot,
        temperature, torch.randint(-(2**62), 2**62, (SLOTS,), generator=g), MASK,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("batch", "most", "vocabulary", "dtype"),
    [
        (1, 1, 64, torch.float32),
        (3, 3, 8193, torch.bfloat16),
        (33, 7, 300, torch.float16),
        (1, 15, 1000, torch.float32),
        (2, 3, 151_936, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("kind", ["sampled", "mixed", "argmax"])
def test_drafts_equal_the_oracles(batch, most, vocabulary, dtype, kind):
    rows = mask_rows(batch, most, vocabulary, dtype, (lambda b: b % 2 == 0) if kind == "mixed" else lambda b: False)
    rows.logits[0], rows.logits[1, ::7] = float("-inf"), float("nan")
    results = []
    for run in (draft_oracle.draft_rows, draft_kernel.draft_rows):
        drafts = torch.empty(batch, most, dtype=torch.int64)
        kept = None if kind == "argmax" else torch.full((SLOTS, most, vocabulary), 7.0, dtype=dtype)
        run(rows, drafts, kept)
        results.append((drafts, kept))
    assert torch.equal(results[0][0], results[1][0])
    if kind != "argmax":
        assert torch.equal(results[0][1].nan_to_num(1.0, 2.0, 3.0), results[1][1].nan_to_num(1.0, 2.0, 3.0))
    live = torch.arange(most) < rows.count.unsqueeze(1)
    assert (results[1][0][live] != MASK).all()
    assert (results[1][0][~live] == MASK).all()


def test_drafts_come_from_q():
    samples, vocabulary = 100_000, 11
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(1, vocabulary, generator=g)
    ones = torch.ones(samples, dtype=torch.int64)
    rows = MaskRows(
        logits.expand(samples, -1), torch.arange(samples), ones, ones * 9, torch.arange(samples),
        torch.full((samples,), 0.7), torch.arange(samples) * 7919, MASK,
    )  # fmt: skip
    drafts, kept = torch.empty(samples, 1, dtype=torch.int64), torch.zeros(samples, 1, vocabulary)
    draft_oracle.draft_rows(rows, drafts, kept)
    assert kept[0, 0, MASK] == float("-inf")
    q = (kept[0, 0] / 0.7).softmax(-1)
    assert chi_square(torch.bincount(drafts[:, 0], minlength=vocabulary), q).pvalue > 1e-3


def test_a_draft_is_drawn_from_what_is_kept():
    """Where q is kept in fewer bits than the logits have, the draft is drawn from the rounded q: that is verified."""
    rows = mask_rows(6, 3, 400, torch.float32)
    rows = rows._replace(logits=rows.logits + 300)  # where bfloat16 is 2 apart
    for run in (draft_oracle.draft_rows, draft_kernel.draft_rows):
        drafts, kept = torch.empty(6, 3, dtype=torch.int64), torch.zeros(SLOTS, 3, 400, dtype=torch.bfloat16)
        run(rows, drafts, kept)
        rounded = rows.logits.clone()
        for request, (first, count) in enumerate(zip(rows.first_row.tolist(), rows.count.tolist(), strict=True)):
            rounded[first : first + count] = kept[rows.slot[request], :count].float()
        again = torch.empty_like(drafts)
        run(rows._replace(logits=rounded), again, torch.zeros(kept.shape))
        assert torch.equal(drafts, again)
        assert not torch.equal(rounded, rows.logits)


@pytest.mark.parametrize("seed", range(4))
def test_the_gate_equals_the_oracle(seed):
    """Chunks and ends of prompts, rows that start in one, decode rows of any width, drafts fewer or more than slots."""
    g = torch.Generator().manual_seed(seed)
    batch = 9
    slots = torch.randint(0, 7, (batch,), generator=g)
    prefill = torch.full((SLOTS,), 50)
    kind = torch.randint(0, 4, (batch,), generator=g)
    # A chunk of a prompt, its last token with slots (first or behind nine others), a row from before it, a decode row.
    rows = torch.where(kind == 0, 1, slots + 1)
    seq = torch.tensor([30, 49, 45, 70])[kind] + torch.where(kind == 0, 0, rows)
    tokens = torch.where(kind == 0, 20, rows + torch.where(kind == 1, 9 * (seq % 2), 0))
    starts = [torch.cat([torch.zeros(1), x.cumsum(0)]).int() for x in (tokens, rows)]
    slot = torch.randperm(SLOTS, generator=g)[:batch]
    given = Batch(
        starts[0], starts[1], seq.int(), prefill.int(), slot, torch.randint(0, 4, (SLOTS,), generator=g).int()
    )
    own = torch.randint(-1, 3, (batch,), generator=g)
    results = []
    for run in (gate_oracle.gate, gate_kernel.gate):
        out = Gate(
            torch.empty(batch, dtype=torch.int32), torch.empty(batch, dtype=torch.int32),
            torch.full((300,), -9), torch.full((100,), -9),
        )  # fmt: skip
        run(given, own, 3, out)
        results.append(out)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    found = results[1]
    assert torch.equal(found.drafts + found.masks, torch.where((kind == 1) | (kind == 3), slots, 0).int())
    assert not found.drafts[kind == 1].any()
    assert int((found.logits_adapter == 3).sum()) == int(found.masks.sum()) == int((found.token_adapter == 3).sum())


def test_lora_metadata_means_what_vllms_means():
    """The same rows in the same groups as vLLM's own preparation, which waits for the device."""
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta

    from vllm_idlm.v2.lora import fill_kernel_meta

    mapping = torch.tensor([-1, 2, 2, 0, -1, -1, 2, 0, -1])
    theirs, ours = LoRAKernelMeta.make(4, 32, "cpu"), LoRAKernelMeta.make(4, 32, "cpu")
    theirs.prepare_tensors(mapping)
    fill_kernel_meta(ours, mapping)
    assert _groups(ours, 9) == _groups(theirs, 9) == {0: [3, 7], 2: [1, 2, 6]}
    fill_kernel_meta(ours, torch.full((5,), -1))
    assert _groups(ours, 5) == {}


def _groups(meta, tokens):
    """Rows by adapter, as vLLM's kernels walk them: they skip a group of adapter -1 and an empty one."""
    order, found = meta.token_indices_sorted_by_lora_ids[:tokens].tolist(), {}
    for i in range(int(meta.default_num_active_loras_cpu)):
        adapter, count, first = (
            int(x[i]) for x in (meta.active_lora_ids, meta.num_tokens_per_lora, meta.lora_token_start_loc)
        )
        if adapter >= 0 and count:
            found[adapter] = order[first : first + count]
    return found
