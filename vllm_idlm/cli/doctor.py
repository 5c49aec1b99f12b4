"""`idlm doctor`: what is installed, what would run, what is broken, and the fix for each."""

from __future__ import annotations

from typing import Annotated

import typer

from vllm_idlm.cli.screen import fail, out, quiet

_SIGNS = {"ok": "[green]ok[/green]", "note": "[yellow]note[/yellow]", "broken": "[bold red]broken[/bold red]"}


def doctor(
    fix: Annotated[
        bool, typer.Option("--fix", help="Write vLLM's metadata entry and make the embedded model.")
    ] = False,
) -> None:
    """Check the installation. Exit status 1 if something is broken."""
    quiet()
    from rich.table import Table

    from vllm_idlm.cli import checks

    if fix:
        try:
            checks.repair(lambda words: out.print(words, style="dim"))
        except Exception as error:
            fail(str(error))
    found = checks.run_all()
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for item in found:
        text = item.found + (f"\n[bold]fix:[/bold] {item.fix}" if item.fix else "")
        table.add_row(_SIGNS[item.state], item.name, text)
    out.print(table)
    broken = sum(item.state == "broken" for item in found)
    out.print(f"[bold red]{broken} broken[/bold red]" if broken else "[green]nothing is broken[/green]")
    raise typer.Exit(1 if broken else 0)
