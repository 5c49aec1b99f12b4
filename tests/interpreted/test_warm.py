"""One compiled form of each kernel and flag, whatever the batch, and all of them compiled before the first request."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vllm_idlm.kernels.draft import triton as draft_kernel
from vllm_idlm.kernels.gate import Batch, Gate
from vllm_idlm.kernels.gate import triton as gate_kernel
from vllm_idlm.kernels.verify import triton as verify_kernel

from tests.interpreted.launches import flags, recorded
from tests.interpreted.test_draft import mask_rows
from tests.interpreted.test_speculator import PROMPTS, ask, start
from tests.interpreted.test_verify import make
from tests.support import tiny
from tests.support.engines import proposer

KERNELS = {"verify._row_stats", "verify._race", "verify._finish", "draft._race", "draft._pick", "gate._gate"}


def one_each(found):
    """Of every kernel, no two forms have the same flags."""
    for kernel, forms in found.items():
        assert len(set(flags(forms))) == len(forms), (kernel, forms)


@pytest.mark.parametrize("most", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_one_form_whatever_the_batch(most, monkeypatch):
    """An odd number of blocks and of places, where halves of one tensor would begin between multiples of 16 bytes."""
    monkeypatch.setattr(verify_kernel, "STATS_BLOCK", 64)
    monkeypatch.setattr(verify_kernel, "RACE_BLOCK", 64)
    with recorded() as found:
        for batch in range(1, 10):
            for processed in (False, True):
                verify_kernel.verify_rows(make(batch, most, 150, processed=processed))
            kept = torch.zeros(70, most, 150)
            drafts = torch.empty(batch, most, dtype=torch.int64)
            draft_kernel.draft_rows(mask_rows(batch, most, 150, torch.float32), drafts, kept)
    assert set(found) == KERNELS - {"gate._gate"}
    one_each(found)
    assert {kernel: len(forms) for kernel, forms in found.items() if len(forms) > 1} == {
        "verify._row_stats": 2,
        "verify._race": 2,
    }


def run_gate(batch, adapter, halves):
    starts = torch.arange(batch + 1, dtype=torch.int32)
    layout = Batch(
        starts, starts, torch.ones(batch, dtype=torch.int32), torch.ones(9, dtype=torch.int32), torch.arange(batch),
        torch.zeros(9, dtype=torch.int32),
    )  # fmt: skip
    counts = torch.empty(2, batch, dtype=torch.int32) if halves else [starts.new_empty(batch) for _ in range(2)]
    gate_kernel.gate(layout, torch.zeros(batch), adapter, Gate(*counts, torch.empty(9), torch.empty(9)))


def test_the_slot_of_the_adapter_makes_no_form_and_halves_of_a_tensor_would():
    with recorded() as found:
        for batch, adapter in ((1, -1), (4, 0), (3, 1), (5, 2)):
            run_gate(batch, adapter, halves=False)
    assert len(found["gate._gate"]) == 1
    with recorded() as found:
        for batch in (3, 4):
            run_gate(batch, 0, halves=True)
    assert len(found["gate._gate"]) == 2, "the check cannot fail"


CASES = [
    {},
    {"temperature": 1.0, "seed": 1},
    {"repetition_penalty": 1.4},
    {"temperature": 0.9, "top_k": 5, "seed": 2},
    {"logprobs": 2},
    {"temperature": 1.2},
]


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("gated", "n", "settings"),
    [
        (True, 4, {"coverage": "all"}),
        (False, 3, {"coverage": "last", "draft_sampling": "greedy"}),
        pytest.param(True, 3, {"coverage": "last"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_service_launches_what_the_warm_up_did(tmp_path, gated, n, settings):
    """Batches of 9 to 1 requests, with options and without; logits are a part of wider rows (a padded vocabulary)."""
    model = tiny.write_tiny(tmp_path / "model", vocab=50)
    folders = str(model), str(tiny.write_adapter(tmp_path / "draft", model, scale=0.5))
    sizes = set()
    with recorded() as warm:
        llm = start(folders, gated, n, settings=settings, max_num_seqs=9)
    sampler = proposer(llm).runner.rejection_sampler
    judge = sampler._judge
    sampler._judge = lambda step, *args: sizes.add(step.batch.num_reqs) or judge(step, *args)
    with recorded() as served:
        ask(llm, PROMPTS[:1], 6)
        prompts, lengths = (PROMPTS * 2)[:9], np.arange(4, 40, 4)
        each = [{"max_tokens": int(length), **CASES[i % len(CASES)]} for i, length in enumerate(lengths)]
        ask(llm, prompts, each=each)
    assert sizes >= set(range(2, 10))
    for kernel in KERNELS:
        assert served[kernel] == warm[kernel], kernel
    one_each({kernel: warm[kernel] for kernel in KERNELS})
