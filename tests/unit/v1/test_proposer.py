"""What a step's rows are mapped to on Model Runner V1, and where nothing is mapped."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
from vllm_idlm.proposers.state import Row

from vllm_idlm.v1.proposer import DRAFT_LORA_ID, ISDProposer


@pytest.mark.parametrize(
    ("bare", "mapped", "adapters", "graph", "left_out"),
    [
        (True, False, {}, True, True),
        (False, False, {}, True, False),  # rows with slots: mask rows take the draft adapter
        (True, True, {}, True, False),  # the output head would go by the mapping of the step before
        (True, False, {1: "a user's"}, True, False),
        (True, False, {}, False, False),  # no graph without LoRA
    ],
)
def test_when_no_adapter_is_mapped(bare, mapped, adapters, graph, left_out):
    isd = ISDProposer.__new__(ISDProposer)
    isd.bare, isd.mapped = bare, mapped
    isd.base_graph = SimpleNamespace(use=lambda base: graph)
    assert isd.without_lora(SimpleNamespace(lora_id_to_lora_request=adapters)) is left_out


def test_mask_rows_have_the_draft_adapter_and_others_the_requests_own():
    """Requests with an adapter of their own, with none, without slots, and one that is in its prompt."""
    isd = ISDProposer.__new__(ISDProposer)
    isd.stats = SimpleNamespace(timed=contextlib.nullcontext)
    isd.bare = False
    rows = {"own": Row((9, 9), 3), "none": Row((), 3), "bare": Row(), "prompt": Row((), 2)}
    isd.rows = rows
    isd.runner = SimpleNamespace(input_batch=SimpleNamespace(req_ids=list(rows)))
    batch = SimpleNamespace(request_lora_mapping=np.array([7, 0, 7, 4]), num_reqs=4)
    draft = DRAFT_LORA_ID
    sampled, tokens = isd.lora_mapping(batch, np.array([6, 4, 1, 7]), np.array([6, 4, 1, 3]))
    assert sampled.tolist() == [7, 7, 7, *[draft] * 3, 0, *[draft] * 3, 7, 4, draft, draft]
    assert tokens.tolist() == [7, 7, 7, *[draft] * 3, 0, *[draft] * 3, 7, *[4] * 5, draft, draft]
