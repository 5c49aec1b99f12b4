"""`idlm doctor`: what is installed, what would run, what is broken, and the fix for each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_idlm.cli.screen import fail, out, quiet

_SIGNS = {"ok": "[green]ok[/green]", "note": "[yellow]note[/yellow]", "broken": "[bold red]broken[/bold red]"}
_DEFAULT = "smollm2-135m-risd"


def _option(*names: str, **options: Any) -> Any:
    return typer.Option(*names, rich_help_panel="With --engine", **options)


def doctor(
    model: Annotated[
        str | None, typer.Argument(help=f"With --engine: zoo name, hub id or folder (default: {_DEFAULT}).")
    ] = None,
    fix: Annotated[
        bool, typer.Option("--fix", help="Write vLLM's metadata entry and make the embedded model.")
    ] = False,
    engine: Annotated[
        bool,
        typer.Option("--engine", help="Then decode with and without ISD, drafts forced right and wrong, and compare."),
    ] = False,
    lora: Annotated[str | None, _option(help="Draft adapter. Default: the zoo's.")] = None,
    mask_token_id: Annotated[int | None, _option(min=0, help="Default: the zoo's, the adapter's, the model's.")] = None,
    n: Annotated[int | None, _option(min=2, max=16, help="Stride. Default: the zoo's.")] = None,
    dtype: Annotated[str | None, _option(help="Default: the model's; float32 for ours on a CPU.")] = None,
    compiled: Annotated[
        bool | None, _option("--compiled/--eager", help="Default: as served (CUDA graphs) on a GPU, eager on a CPU.")
    ] = None,
    engine_args: Annotated[str | None, _option(help="JSON: other engine arguments of vLLM, as served.")] = None,
    json_file: Annotated[Path | None, _option("--json", help="Write what was found here.")] = None,
    verbose: Annotated[bool, _option("--verbose", "-v", help="Show what vLLM prints.")] = False,
) -> None:
    """Check the installation; with --engine also that this machine decodes rightly. Exit status 1 if it does not."""
    asked = {"lora": lora, "mask_token_id": mask_token_id, "n": n, "dtype": dtype, "compiled": compiled}
    asked |= {"engine_args": engine_args}
    given = [name for name, value in {"MODEL": model, "json": json_file, **asked}.items() if value is not None]
    if given and not engine:
        fail(f"{', '.join(given)}: only with --engine, which starts an engine; add it", 2)
    quiet()
    broken = _look(fix)
    if broken or not engine:
        out.print(f"[bold red]{broken} broken[/bold red]" if broken else "[green]nothing is broken[/green]")
        if broken and engine:
            out.print("No engine was started: mend that first.")
        raise typer.Exit(1 if broken else 0)
    from vllm_idlm.cli import canary

    try:
        good = canary.run(canary.Options(model or _DEFAULT, **asked), json_file, verbose)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    raise typer.Exit(0 if good else 1)


def _look(fix: bool) -> int:
    """Print every finding, mended first if asked; how many are broken."""
    from rich.markup import escape
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
        text = escape(item.found) + (f"\n[bold]fix:[/bold] {escape(item.fix)}" if item.fix else "")
        table.add_row(_SIGNS[item.state], item.name, text)
    out.print(table)
    return sum(item.state == "broken" for item in found)
