"""What vLLM 0.32 (built for torch 2.13) wants and torch 2.11 lacks. Loaded by sitecustomize.py in every Python.

Put in when torch is first imported, so that a Python without torch starts as fast as ever.
"""

import importlib.abc
import importlib.util
import sys


def apply(torch):
    """Put in what is missing."""
    # vllm/distributed/parallel_state.py (guarded there; this only spares its warning)
    if hasattr(torch, "accelerator") and not hasattr(torch.accelerator, "empty_host_cache"):
        torch.accelerator.empty_host_cache = lambda: None


class Finder(importlib.abc.MetaPathFinder):
    """Finds torch as anybody would, and has `apply` run behind its import."""

    def find_spec(self, fullname, path=None, target=None):
        """torch's own spec with a longer way through its loader; None for any other name."""
        if fullname != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            try:
                apply(module)
            except Exception as error:
                sys.stderr.write(f"gpukit: shims: {error!r}\n")

        spec.loader.exec_module = exec_module
        return spec


if "torch" in sys.modules:
    apply(sys.modules["torch"])
else:
    sys.meta_path.insert(0, Finder())
