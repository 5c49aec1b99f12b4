"""Forced drafts: scripts are found by the request's name and place."""

from __future__ import annotations

import torch

from vllm_idlm.forced import Forced


def test_scripts_by_name_and_place():
    forced = Forced({"canary-0": [1, 2, 3, 4], "canary-1": [5, 6]})
    assert forced.ahead("canary-0-abcdef12", 2, [9, 9, 9]) == [3, 4, 9]
    assert forced.ahead("canary-1", 1, [9]) == [6]
    assert forced.ahead("other-1", 0, [9]) == [9]
    requests = ["canary-1-0", "else", "canary-0-abcdef12"]
    got = forced.over(requests, torch.tensor([1, 0, 2]), torch.full((3, 3), 9))
    assert got.tolist() == [[6, 9, 9], [9, 9, 9], [3, 4, 9]]
