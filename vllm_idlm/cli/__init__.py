"""The command line `idlm`. Commands import vLLM and torch only when they run, so that `idlm --help` answers at once."""

from __future__ import annotations

from typing import Annotated

import typer

from vllm_idlm.cli import (
    batch,
    bench,
    chat,
    data,
    demo,
    doctor,
    eval_acceptance,
    evaluate,
    models,
    plan,
    serve,
    train,
)

app = typer.Typer(
    name="idlm",
    help="Introspective strided decoding (I-DLM, R-ISD) on vLLM: the same text in fewer forwards.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(demo.demo)
app.command(context_settings=serve.PASS_ON)(serve.serve)
app.command()(chat.chat)
app.command()(batch.batch)
app.command()(models.models)
app.command()(data.data)
app.command()(train.train)
app.command("eval-acceptance")(eval_acceptance.eval_acceptance)
app.command("eval")(evaluate.evaluate)
app.command()(plan.plan)
app.command()(bench.bench)
app.command()(doctor.doctor)


def _version(asked: bool) -> None:
    if asked:
        from vllm_idlm import __version__

        typer.echo(f"vllm-idlm {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Version.")] = False,
) -> None:
    """Options of `idlm` itself."""


def main() -> None:
    """The console script `idlm`."""
    app()
