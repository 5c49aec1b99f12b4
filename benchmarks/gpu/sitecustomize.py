"""Loaded by every Python that has the site folder on PYTHONPATH, spawned ones too; imports nothing heavy.

1. `vllm_idlm` and its packages that stand at the top of the repository are found in the checkout, as after
   `pip install -e`, so that `python -m benchmarks.x` works from its root.
2. shims.py: what vLLM wants of a newer torch.
"""

import os
import sys
from importlib.util import spec_from_file_location

PACKAGES = ("kernels", "proposers", "configs")  # at the top of the repository, imported below vllm_idlm
_REPO = os.environ.get("GPUKIT_REPO")


class Checkout:
    """Finds the project's packages in a checkout."""

    def __init__(self, repo):
        self._folders = {"vllm_idlm": f"{repo}/vllm_idlm"}
        self._folders |= {f"vllm_idlm.{name}": f"{repo}/{name}" for name in PACKAGES}

    def find_spec(self, fullname, path=None, target=None):
        """The package's spec, or None for a name of somebody else."""
        folder = self._folders.get(fullname)
        if folder is None:
            return None
        return spec_from_file_location(fullname, f"{folder}/__init__.py", submodule_search_locations=[folder])


if _REPO:
    sys.meta_path.insert(0, Checkout(_REPO))

try:
    import shims  # noqa: F401
except ImportError:
    pass
except Exception as error:  # a broken shim must not keep Python from starting
    sys.stderr.write(f"gpukit: shims.py failed: {error!r}\n")
