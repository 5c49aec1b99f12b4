"""`idlm train`: a gated draft adapter, or a full conversion, from samples and a configuration file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_idlm.cli.screen import fail, out


def train(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of one in configs/train.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as in steps=500 adapter.rank=16")] = None,
) -> None:
    """Train a draft adapter (or a whole model) to fill mask slots; run again after an interruption to go on.

    On several devices: accelerate launch --config_file FILE -m vllm_idlm.cli train CONFIG ..
    """
    from vllm_idlm.data.errors import DataError
    from vllm_idlm.training import config as configs

    try:
        settings = configs.load(config_file(config), overrides or ())
        _run(settings)
    except (configs.ConfigError, DataError, ValueError) as error:
        fail(str(error), 2)
    except KeyboardInterrupt:
        out.print("stopped; the same command goes on from the last checkpoint")
        raise typer.Exit(130) from None


def config_file(name: str) -> Path:
    """A configuration by path or by its name in the package."""
    from importlib.resources import files

    if Path(name).is_file():
        return Path(name)
    shipped = Path(str(files("vllm_idlm.configs"))) / "train" / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    known = sorted(p.stem for p in shipped.parent.glob("*.yaml"))
    fail(f"{name}: no such file, and no configuration of that name; shipped are {', '.join(known) or 'none'}", 2)


def _run(config: Any) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from vllm_idlm.data.model import tokenizer_if_any
    from vllm_idlm.training import start

    base = start.base(config)
    samples, held = start.samples(config, tokenizer_if_any(Path(base.folder)))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = int(os.environ.get("LOCAL_RANK", "0")) == 0  # one bar, however many devices
    bar = Progress(*columns, TextColumn("{task.fields[figures]}"), console=out, disable=not shown)
    with bar as progress:
        task = progress.add_task("steps", total=config.steps, figures="")

        def report(event: str, values: dict[str, Any]) -> None:  # the main process's alone
            if event == "step":
                figures = f"loss {values['loss']:.3f}  alpha {values['alpha']:.3f}  {values['speed']:.0f} mask tokens/s"
                progress.update(task, completed=values["step"], figures=figures)
            elif event == "eval":
                progress.console.print(held_out(values))

        run = start.run(config, base, samples, held, report)
        if run.resume():
            progress.console.print(f"going on from step {run.step}")
            progress.update(task, completed=run.step)
        complete = run.train()
    folder = run.export()
    state = "done" if complete else f"stopped at step {run.step} of {config.steps}; the same command goes on"
    if run.accelerator.is_main_process:
        out.print(f"{state}. Written to {folder}", markup=False)


def held_out(values: dict[str, Any]) -> str:
    """One line for an evaluation."""
    alpha = " ".join(f"{a:.3f}" for a in values["alpha"])
    return f"step {values['step']}: held out alpha {alpha}, forecast TPF {values['tpf']:.3f} (temperature 1)"
