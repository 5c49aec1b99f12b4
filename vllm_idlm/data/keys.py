"""What identifies a prompt, and on which side of the split it falls: decided by its text alone."""

from __future__ import annotations

import hashlib
import json
from typing import Any

TRAIN, EVAL = "train", "eval"


def prompt_key(prompt: list[dict[str, Any]] | list[int]) -> str:
    """Twenty hex digits of the SHA-256 of a prompt: its chat messages, or its token ids where nothing else is known."""
    plain = [[m["role"], m["content"]] if isinstance(m, dict) else int(m) for m in prompt]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:20]


def side(key: str, held_out: float) -> str:
    """`train` or `eval`: a share of `held_out` of all keys is held out, and stays so whatever other prompts there are.

    A larger share holds out the same prompts and more.
    """
    place = int(hashlib.sha256(key.encode()).hexdigest()[:12], 16) / 16**12
    return EVAL if place < held_out else TRAIN
