"""What the canary's engine is given: wrong drafts, and prompts of a length that tells."""

from __future__ import annotations

from vllm_idlm.cli import _canary


def test_wrong_drafts_are_wrong_everywhere_and_never_the_mask():
    for answer in ([5, 6, 7], [5, 5, 5], [16, 16, 5], [0, 0, 0], [1, 2, 0]):
        for mask in (16, 0, 1):
            other = _canary.wrong(answer, mask)
            assert all(a != b != mask for a, b in zip(answer, other, strict=True))


def test_a_long_prompt_ends_in_front_of_a_block():
    assert _canary.fitted([1] * 50, 16) == [1] * 50
    for length in (250, 400):
        assert (len(_canary.fitted(list(range(length)), 128)) + 16) % 128 == 0
