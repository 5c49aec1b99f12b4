"""`idlm models`: the model zoo."""

from __future__ import annotations

from vllm_idlm.cli.screen import fail, out


def models() -> None:
    """List the model zoo: names that work wherever vLLM takes a model."""
    from rich.table import Table

    from vllm_idlm import zoo

    table = Table(box=None, padding=(0, 2, 1, 0), header_style="bold")
    for heading in ("name", "n", "mask token", "model, adapter, note, file"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "name")
    try:
        folders = zoo.folders()
        for entry in map(zoo.load, zoo.names()):
            file = next(f for folder in folders if (f := folder / f"{entry.name}.yaml").is_file())
            adapter = [f"adapter {entry.lora}"] if entry.lora else []
            about = "\n".join([entry.model, *adapter, f"[dim]{entry.description}", f"{file}[/dim]"])
            table.add_row(f"[bold]{entry.name}[/bold]", str(entry.n), str(entry.mask_token_id), about)
    except zoo.ZooError as error:
        fail(str(error))
    out.print(table)
    out.print("A name works in `idlm serve NAME`, `vllm serve NAME` and LLM(NAME).")
    out.print("A folder of such files of your own, in $VLLM_IDLM_CONFIGS, is searched first.")
