"""The `vllm.general_plugins` entry point: vLLM calls `register` in each of its processes before it builds anything."""

from __future__ import annotations


def register() -> None:
    """Enter the patches of the ledger and the model architectures. Cheap, and safe to call any number of times.

    Nothing heavy is imported here: patches apply when vLLM imports their module, architectures are named by string.
    """
    from vllm_idlm import ledger  # noqa: F401  its import enters the patches
    from vllm_idlm.patching import install

    install()
