"""The mechanism behind the ledger: patches of vLLM as data, checked against its source and applied at import.

    record    what a patch is: its purpose, the vLLM code it relies on, the functions it wraps
    tree      vLLM's source as a folder, a wheel or the installation, read without importing it
    code      what is compared: parameters, text, attributes, a fingerprint
    fit       whether the patches fit a tree, and which of the code they rely on nobody has reviewed yet
    uses      the vLLM names that this plugin imports and calls, looked up in a tree
    live      applying patches in this process, and refusing an engine whose patches do not fit

The entries stand in `vllm_idlm.ledger`. Nothing here imports vLLM or torch.
"""

from vllm_idlm.patching.live import install, installed, left_out, misfit, of_isd, original, replace, require, runs_isd
from vllm_idlm.patching.record import SUPPORTED, LedgerError, Patch, entries, patch
from vllm_idlm.patching.tree import Tree, vllm_version

__all__ = [
    "LedgerError",
    "Patch",
    "SUPPORTED",
    "Tree",
    "entries",
    "install",
    "installed",
    "left_out",
    "misfit",
    "of_isd",
    "original",
    "patch",
    "replace",
    "require",
    "runs_isd",
    "vllm_version",
]
