"""What the next rows are to carry on Model Runner V1, where it is chosen as it goes."""

from __future__ import annotations

from vllm_idlm.proposers.estimates import Cost
from vllm_idlm.proposers.state import Row

from vllm_idlm.settings import ISDSettings
from vllm_idlm.v1.policy import Auto


def test_drafts_are_counted_as_they_were_verified():
    """A forward emits one token more than drafts were accepted; one without drafts says nothing."""
    policy = Auto(ISDSettings(n=4, mask_token_id=1), Cost([1, 16], [1.0, 1.1], [1.2, 1.3]))
    rows = [((5, 6, 7), [5, 6, 7, 8]), ((5, 6, 7), [5, 9]), ((5, 6), [9]), ((), [4])]
    policy.observe([("r", Row(drafts, 3, None, (), (0.5,) * len(drafts)), tokens) for drafts, tokens in rows])
    accepted, tried = policy.acceptance._counts.sum(1).T
    assert tried.tolist() == [3, 2, 1]
    assert accepted.tolist() == [2, 1, 1]
