"""The measured tables of step times: a busy moment is taken off them."""

from __future__ import annotations

from vllm_idlm import calibrate


def test_a_busy_moment_is_taken_off_the_tables():
    made = calibrate._tables({
        (1, False): 9.0, (1, True): 3.0, (4, False): 2.5, (4, True): 8.0, (7, False): 3.0, (7, True): 4.0,
    })  # fmt: skip
    assert made == ([1, 4, 7], [2.5, 2.5, 3.0], [3.0, 4.0, 4.0])
    assert calibrate._tables({(1, False): 1.0, (4, False): 2.0}) == ([1, 4], [1.0, 2.0], [1.0, 2.0])
