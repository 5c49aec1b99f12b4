"""`python -m vllm_idlm.ledger`: every patch, what it is for, and whether it fits the installed vLLM."""

from rich.console import Console
from rich.table import Table

from vllm_idlm import ledger
from vllm_idlm.cli.screen import quiet
from vllm_idlm.ledger.core import vllm_version

if __name__ == "__main__":
    quiet()
    ledger.install()
    fits = ledger.check()
    console = Console(highlight=False)
    for entry in ledger.entries():
        sign = "[green]fits[/green]" if fits[entry.name] == "applied" else "[bold red]does not fit[/bold red]"
        console.print(f"[bold]{entry.name}[/bold]  {sign}  {entry.module}")
        table = Table(box=None, show_header=False, padding=(0, 1, 0, 2))
        table.add_row("what", entry.what)
        table.add_row("why", entry.why)
        table.add_row("until", entry.removed_by)
        if fits[entry.name] != "applied":
            table.add_row("state", fits[entry.name])
        console.print(table)
    wrong = sum(state != "applied" for state in fits.values())
    console.print(f"\nvLLM {vllm_version()}: {len(fits) - wrong} of {len(fits)} patches fit")
    raise SystemExit(wrong > 0)
