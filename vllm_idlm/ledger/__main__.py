"""`python -m vllm_idlm.ledger`: every patch, what it is for, and whether it fits the installed vLLM."""

from rich.console import Console
from rich.table import Table

from vllm_idlm import ledger
from vllm_idlm.ledger.core import vllm_version

if __name__ == "__main__":
    ledger.install()
    fits = ledger.check()
    table = Table(
        "patch", "module", "what", "why", "removed by", "state", title=f"vLLM {vllm_version()}", show_lines=True
    )
    for entry in ledger.entries():
        table.add_row(entry.name, entry.module, entry.what, entry.why, entry.removed_by, fits[entry.name])
    Console().print(table)
    raise SystemExit(any(state != "applied" for state in fits.values()))
