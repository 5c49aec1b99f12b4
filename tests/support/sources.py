"""Make up a source tree in the place of vLLM's, and a patch of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_idlm.patching import Patch, Tree

RUNNER = '''
class Mixin:
    def inherited(self, a, b=1):
        """Says something."""
        return a + b  # and more

class Runner(Mixin):
    field: int = 0

    def __init__(self, config):
        self.sampler = config

    @staticmethod
    def fixed(config):
        return config

    def step(self, output, *, flag=False):
        return self.sampler(output)
'''


def write_tree(folder: Path, **files: str) -> Tree:
    """Write modules of `vllm` below the folder, by name ("__of__" is a slash); returns them as a source tree."""
    for name, text in {"__init__": "", **files}.items():
        file = folder / "vllm" / f"{name.replace('__of__', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return Tree(folder)


def patch(**options: Any) -> Patch:
    """A patch of `vllm.runner`."""
    return Patch("some", "vllm.runner", frozenset({"isd"}), "what", "why", "never", **options)
