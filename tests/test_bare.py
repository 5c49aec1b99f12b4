"""A step without slots on Model Runner V1: what is left out for it, and what is not."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from vllm_idlm.v1.proposer import ISDProposer
from vllm_idlm.v1.stats import ISDStats


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


def test_it_is_counted_as_forwards_without_drafts():
    whole, bare = ISDStats(), ISDStats()
    whole.count(np.zeros(3, dtype=np.int64), np.ones(3, dtype=np.int64), 3)
    bare.count_bare(3)
    assert bare.as_dict() == whole.as_dict()
