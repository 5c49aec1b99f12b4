"""`idlm data`: a model's own answers to prompts, made by vLLM, as training data for its draft adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_idlm.cli.screen import err, fail, out, quiet

DEFAULT_COUNT = 4096  # prompts of a recipe


def data(
    out_dir: Annotated[Path, typer.Argument(help="Folder of the samples; one that was begun is gone on with.")],
    model: Annotated[str, typer.Option(help="Zoo name (`idlm models`), hub id or folder.")] = "smollm2-135m-risd",
    prompts: Annotated[
        Path | None, typer.Option(help='.txt (one a line), .jsonl or .parquet ("prompt" or "messages").')
    ] = None,
    recipe: Annotated[str, typer.Option(help="Built-in prompts, if --prompts gives none.")] = "chat",
    count: Annotated[
        int | None, typer.Option(min=1, help=f"Prompts. Default: all of the file; {DEFAULT_COUNT} of a recipe.")
    ] = None,
    temperatures: Annotated[str, typer.Option(help="Given to the samples in turn.")] = "0,0.7,1.0",
    answers: Annotated[int, typer.Option(help="Answers to each prompt.")] = 1,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 256,
    held_out: Annotated[float, typer.Option(help="Share of the prompts kept for evaluation.")] = 0.05,
    shard: Annotated[int, typer.Option(help="Prompts of a file.")] = 512,
    file_format: Annotated[str, typer.Option("--format", help="jsonl or parquet.")] = "jsonl",
    seed: Annotated[int, typer.Option(help="Of prompts and answers.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="Default: the zoo's, else vLLM's choice.")] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Answers made at a time.")] = 64,
    eager: Annotated[
        bool, typer.Option("--eager", help="Do not compile the model: a short run is over sooner.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what vLLM prints.")] = False,
) -> None:
    """Let a model answer prompts, and keep the answers as token ids to train its draft adapter on."""
    if not verbose:
        quiet()
    from vllm_idlm import embedded, zoo
    from vllm_idlm.data import errors, files
    from vllm_idlm.data import model as models
    from vllm_idlm.fingerprint import FingerprintError

    choice = {"answers": answers, "max_tokens": max_tokens, "held_out": held_out, "shard": shard, "seed": seed}
    choice |= {"format": file_format, "temperatures": _numbers(temperatures)}
    try:
        chosen, origin = _prompts(prompts, recipe, count, seed)
        _check(choice)
        folder, needs = models.locate(model)
        out_dir.mkdir(parents=True, exist_ok=True)
        with files.locked(out_dir):
            engine = {"dtype": dtype or needs.get("dtype", "auto"), "batch": max_num_seqs, "eager": eager}
            _run(out_dir, chosen, {**choice, **origin, "model": model}, folder, needs, engine)
    except (errors.DataError, FingerprintError, zoo.ZooError, embedded.EmbeddedModelError, OSError) as error:
        fail(str(error), 2 if isinstance(error, errors.DataError) else 1)
    except KeyboardInterrupt:
        err.print(f"stopped; the same command goes on after the shards that are whole in {out_dir}", markup=False)
        raise typer.Exit(130) from None


def _run(
    out_dir: Path,
    prompts: list[Any],
    choice: dict[str, Any],
    folder: Path,
    needs: dict[str, Any],
    engine: dict[str, Any],
) -> None:
    """Everything after the options are read: record, engine, generation, table."""
    from vllm_idlm.data import distil, model, plan, record
    from vllm_idlm.fingerprint import fingerprint

    tokenizer = model.tokenizer(folder)
    template = getattr(tokenizer, "chat_template", None)
    settings = plan.Settings(
        **choice, dtype=engine["dtype"], fingerprint=fingerprint(folder),
        chat_template=None if template is None else hashlib.sha256(str(template).encode()).hexdigest(),
    )  # fmt: skip
    begun = record.begin(out_dir, settings)
    shards = plan.shards(prompts, settings)
    todo = distil.missing(out_dir, shards)
    made = distil.Made()
    if len(todo) < len(shards):
        out.print(f"{len(shards) - len(todo)} of {len(shards)} shards are there already", style="dim")
    if todo:
        ids = distil.encode([prompt for shard in todo for prompt in shard.prompts], tokenizer)
        length = max(map(len, ids.values())) + settings.max_tokens
        options = model.engine_options(folder, needs, **engine, length=length)
        record.start_run(begun, {name: value for name, value in options.items() if name != "model"})
        for done, made in _generate(out_dir, todo, ids, settings, options):  # noqa: B007 (the last one counts)
            record.add_shard(out_dir, begun, done.name)
    counts = record.finish(out_dir, begun, shards)
    _table(out_dir, counts, made)


def _generate(out_dir: Path, todo: list[Any], ids: dict, settings: Any, options: dict[str, Any]) -> Iterator:
    """Start the engine and make the shards, with a progress bar over samples."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from vllm import LLM

    from vllm_idlm.data import distil

    with out.status("starting the engine"):
        llm = LLM(**options, disable_log_stats=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[rate]}"), console=out) as progress:
            total = sum(len(shard.prompts) for shard in todo) * settings.answers
            task = progress.add_task("answers", total=total, rate="")
            yield from distil.make(llm, out_dir, todo, ids, settings, _meter(progress, task))
    finally:
        llm.llm_engine.engine_core.shutdown()


def _meter(progress: Any, task: Any) -> Any:
    """What is called with the tokens of each finished answer: moves the bar and shows the rate."""
    done = 0

    def on_answer(tokens: int) -> None:
        nonlocal done
        done += tokens
        seconds = progress.tasks[0].elapsed or 0
        progress.update(task, advance=1, rate=f"{done / seconds:.0f} tokens/s" if seconds else "")

    return on_answer


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        fail(f"--temperatures {text}: give numbers from 0 on, separated by commas: 0,0.7,1.0", 2)


def _prompts(file: Path | None, recipe: str, count: int | None, seed: int) -> tuple[list[Any], dict[str, Any]]:
    """The prompts, and the settings that say where they come from."""
    from vllm_idlm.data import prompts
    from vllm_idlm.data import recipe as recipes

    if file is not None:
        found = prompts.load(file, count)
        return found, {"prompts": str(file), "prompts_sha256": prompts.digest(file), "count": count}
    many = DEFAULT_COUNT if count is None else count
    origin = {"prompts": f"recipe {recipe}", "prompts_sha256": recipes.digest(recipe), "count": many}
    return prompts.built_in(recipe, many, seed), origin


def _check(choice: dict[str, Any]) -> None:
    """Refuse settings that cannot be before a model is fetched for them."""
    from vllm_idlm.data import plan

    unknown = dict.fromkeys(
        ("model", "fingerprint", "dtype", "chat_template", "prompts", "prompts_sha256", "count"), ""
    )
    plan.check(plan.Settings(**unknown, **choice))


def _table(folder: Path, counts: dict[str, Any], made: Any) -> None:
    from rich.table import Table

    table = Table(title=f"{counts['samples']} samples, {counts['tokens']} tokens, {counts['prompts']} prompts")
    table.add_column("by")
    table.add_column("samples")
    for name, label in (("split", "split"), ("kind", "kind"), ("temperature", "temperature"), ("finish_reason", "end")):
        table.add_row(label, "  ".join(f"{value} {number}" for value, number in counts[name].items()))
    if made.samples:
        rate = made.tokens / made.seconds
        table.add_row("this run", f"{made.samples} in {made.seconds:.0f} s, {made.tokens} tokens, {rate:.0f} tokens/s")
    out.print(table)
    out.print(f"Written to {folder}", style="dim", markup=False)
