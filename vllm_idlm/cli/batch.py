"""`idlm batch`: answer a file of prompts on Ray, each row exactly once, however often it is interrupted."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_idlm.cli.screen import err, fail, quiet


def batch(
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="A prompt a line: prompt, messages, prompt_ids.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="The answers, in the order of IN.")],
    model: Annotated[str, typer.Option(help="Zoo name, hub id or folder.")] = "smollm2-135m-risd",
    plain: Annotated[bool, typer.Option("--plain", help="A model of the zoo without ISD.")] = False,
    n: Annotated[int | None, typer.Option(min=2, max=16, help="Stride; default: the zoo's.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer, where a row does not say.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Where a row does not say.")] = 0.0,
    replicas: Annotated[int, typer.Option(min=1, help="Engines.")] = 1,
    tensor_parallel: Annotated[
        int | None, typer.Option(min=1, help="Devices of an engine; default: the zoo's.")
    ] = None,
    in_flight: Annotated[int, typer.Option(min=1, help="Rows that an engine works on at once.")] = 64,
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster (auto: the one here); default: its own.")
    ] = None,
    engine: Annotated[str, typer.Option(help='vLLM\'s engine arguments as JSON, {"max_model_len": 4096}.')] = "{}",
) -> None:
    """Answer every row of IN.jsonl into OUT.jsonl by engines on Ray. Run it again to go on where it was interrupted.

    Exit status 3 if some rows hold an error (a prompt that is too long, say) in the place of an answer.
    """
    quiet()
    from vllm_idlm.batch.errors import BatchError
    from vllm_idlm.batch.journal import Journal
    from vllm_idlm.batch.rows import read
    from vllm_idlm.batch.run import Cluster
    from vllm_idlm.settings import SettingsError
    from vllm_idlm.zoo import ZooError

    try:
        content = source.read_bytes()
        rows = read(source, {"max_tokens": max_tokens, "temperature": temperature})
        options = engine_options(model, plain, n, tensor_parallel, in_flight, engine)
        job = {"input": hashlib.sha256(content).hexdigest(), "max_tokens": max_tokens, "temperature": temperature}
        job["engine"] = {k: v for k, v in options.items() if k not in ("max_num_seqs", "tensor_parallel_size")}
        cluster = Cluster(replicas, options["tensor_parallel_size"], address)
        with Journal(out, job, len(rows)) as journal:
            errors = _run(journal, rows, options, in_flight, cluster)
    except (BatchError, SettingsError, ZooError, OSError) as error:
        fail(str(error), 2)
    if errors:
        fail(f"{errors} of {len(rows)} rows of {out} hold an error instead of an answer (field error)", 3)


def _run(journal: Any, rows: list[dict], options: dict[str, Any], in_flight: int, cluster: Any) -> int:
    from vllm_idlm.batch.run import Driver

    if journal.finished():
        err.print(f"{journal.out} is complete: {len(rows)} rows")
        return 0
    with _bar(len(rows), len(journal.done)) as tell:
        Driver(journal, rows, options, in_flight, cluster, tell).run()
    errors = journal.finish()
    err.print(f"{journal.out}: {len(rows)} rows")
    return errors


def engine_options(
    model: str, plain: bool, n: int | None, tensor_parallel: int | None, in_flight: int, given: str
) -> dict[str, Any]:
    """Keyword arguments of vllm.LLM. Raises BatchError for engine arguments that are no JSON object, ZooError."""
    from vllm_idlm import zoo
    from vllm_idlm.batch.errors import BatchError

    try:
        own = json.loads(given)
        if not isinstance(own, dict):
            raise ValueError(f"{type(own).__name__} where an object is needed")
    except ValueError as error:
        raise BatchError(f'--engine {given!r}: {error}; give a JSON object such as {{"max_model_len": 4096}}') from None
    entry = zoo.resolve(model)
    if entry is None and "/" not in model and not Path(model).is_dir():
        zoo.load(model)  # no folder and no hub id: says which names are near
    if plain and n is not None:
        raise BatchError(f"--plain and --n {n} contradict each other: give one")
    options: dict[str, Any] = {"model": model, "max_num_seqs": in_flight}
    if not plain and (entry is not None or n is not None):
        options["speculative_config"] = {"method": "isd", "n": n or entry.n}
    default = entry.engine_defaults().get("tensor_parallel_size", 1) if entry is not None else 1
    options["tensor_parallel_size"] = tensor_parallel or default
    if options["tensor_parallel_size"] > 1:
        options["distributed_executor_backend"] = "ray"
    return {**options, **own}


@contextlib.contextmanager
def _bar(total: int, done: int) -> Iterator[Callable[[int | str], None]]:
    """A progress bar on stderr, as the function that moves it by a number, or prints a line above it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=err) as progress:
        task = progress.add_task("starting engines", total=total, completed=done)

        def tell(what: int | str) -> None:
            if isinstance(what, str):
                progress.console.print(what, markup=False)
            else:
                progress.update(task, advance=what, description="answering")

        yield tell
