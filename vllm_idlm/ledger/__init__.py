"""The patch ledger: everything in this plugin that touches a vLLM internal, one entry a patch.

    python -m vllm_idlm.ledger      # lists them, and says of each whether it fits the installed vLLM

`core` is the mechanism; the siblings hold the entries by what they reach: `config` (settings and the CLI),
`architectures` (checkpoints that vLLM does not know), `runner` and `runner_v2` (Model Runners V1 and V2), `scheduler`,
`ray_executor`, `lora`, `cpu_cache` and `cpu_linear` (the CPU build's).
"""

# Importing a file enters its patches.
from vllm_idlm.ledger import (  # noqa: F401
    architectures,
    config,
    cpu_cache,
    cpu_linear,
    lora,
    ray_executor,
    runner,
    runner_v2,
    scheduler,
)
from vllm_idlm.ledger.core import LedgerError, check, entries, install, installed, refuse_misfits, require

__all__ = ["LedgerError", "check", "entries", "install", "installed", "refuse_misfits", "require"]
