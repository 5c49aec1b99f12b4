"""`idlm bench`: ISD beside plain decoding and every other speculative method of vLLM, in one run."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_idlm.cli.screen import err, fail, out


def bench(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of one in configs/bench.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, as in rounds=5 methods=[plain,isd,ngram]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where it was interrupted.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure anew, whatever the folder holds.")] = False,
) -> None:
    """Measure decoding methods side by side: speed, latency, acceptance; writes a report with plots."""
    from vllm_idlm.bench import config as configs

    before = signal.signal(signal.SIGTERM, _stop)  # as Ctrl-C does: the engines end too
    try:
        _run(configs.load(_file(config), overrides or ()), resume, fresh)
    except configs.ConfigError as error:
        fail(str(error), 2)
    except KeyboardInterrupt:
        err.print("stopped; the same command with --resume goes on after the last whole round", markup=False)
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


def _file(name: str) -> Path:
    """A configuration by path or by its name in the package."""
    from importlib.resources import files

    if Path(name).is_file():
        return Path(name)
    shipped = Path(str(files("vllm_idlm.configs"))) / "bench" / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    known = sorted(p.stem for p in shipped.parent.glob("*.yaml"))
    fail(f"{name}: no such file, and no configuration of that name; shipped are {', '.join(known) or 'none'}", 2)


def _run(config: Any, resume: bool, fresh: bool) -> None:
    from vllm_idlm.bench import plots, prompts, report
    from vllm_idlm.bench.run import Comparison
    from vllm_idlm.bench.store import Store
    from vllm_idlm.cli import provenance

    store = Store(config)
    if (uses := prompts.repeated(config)) > 1:
        out.print(f"there are fewer prompts than requests: each is used up to {uses:.1f} times", style="dim")
    store.begin(resume, fresh)
    try:
        _measure(Comparison, config, store)
    finally:
        if store.records:
            made = report.make(store, provenance.collect())
            path = report.write(made, store.folder)
            pictures = plots.draw(made, store.folder)
    if not store.records:
        fail("no method could be measured; " + "\n".join(report.failures({"failures": store.state["failures"]})))
    report.show(made, out)
    out.print(f"Written to {path}, with {len(pictures)} pictures beside it", style="dim", markup=False)


def _measure(comparison: Any, config: Any, store: Any) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[what]}"), console=out) as progress:
        screen = _Screen(progress)
        made = comparison(config, store, screen)
        screen.begin(made.left())
        made.run()


class _Screen:
    """Progress of a comparison: one bar over rounds, and what is going on."""

    def __init__(self, progress: Any) -> None:
        self.progress, self.task = progress, None

    def begin(self, total: int) -> None:
        self.task = self.progress.add_task("rounds", total=total, what="")

    def starting(self, method: str) -> None:
        self._say(f"{method}: starting, warming up")

    def started(self, method: str, facts: dict[str, Any]) -> None:
        took, memory = facts["start_seconds"], facts["resident_bytes"] / 1e6
        self.progress.console.print(f"{method}: started in {took:.0f} s, {memory:,.0f} MB resident", style="dim")

    def failed(self, method: str, where: str, message: str) -> None:
        self.progress.console.print(f"{method} failed ({where}) and is left out: {message}", style="red", markup=False)

    def measuring(self, method: str, what: str, answers: int, of: int) -> None:
        self._say(f"{method}: {what}: {answers} of {of}")

    def measured(self, method: str, what: str) -> None:
        self.progress.advance(self.task)

    def _say(self, what: str) -> None:
        self.progress.update(self.task, what=what)
