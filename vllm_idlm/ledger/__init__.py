"""The patch ledger: everything in this plugin that touches a vLLM internal, one entry a patch.

    python -m vllm_idlm.ledger      # lists them, and says of each whether it fits the installed vLLM

`core` is the mechanism; the siblings hold the entries by what they reach: `config` (settings and the CLI), `runner`
(Model Runner V1), `scheduler`, `cpu` (faults of vLLM's CPU build, mended only where a self-test shows them), `lora`.
"""

from vllm_idlm.ledger import config, runner, scheduler  # noqa: F401  (importing a file enters its patches)
from vllm_idlm.ledger.core import LedgerError, check, entries, install, require

__all__ = ["LedgerError", "check", "entries", "install", "require"]
