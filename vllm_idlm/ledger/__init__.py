"""The patch ledger: everything in this plugin that touches a vLLM internal, one entry a patch.

    python -m vllm_idlm.ledger                         # lists them, and says of each whether it fits the installed vLLM
    python -m vllm_idlm.ledger --source TREE_OR_WHEEL  # the same of a vLLM that is not installed
    python -m vllm_idlm.ledger --diff OLD NEW          # what changed of all that the patches rely on

`vllm_idlm.patching` is the mechanism; the files here hold the entries by what they reach: `config` (settings and the
CLI), `models` (checkpoints that vLLM does not know), `scheduler`, `runner_v1` and `runner_v2` (Model Runners V1 and
V2), `ray`, `cpu` (the CPU build's), and `objects` (attributes of vLLM's objects that are replaced, and private state
that is read or made, by code outside this folder).
"""

# Importing a file enters its patches.
from vllm_idlm.ledger import config, cpu, models, objects, ray, runner_v1, runner_v2, scheduler  # noqa: F401
