"""`idlm demo`: the same prompts by plain decoding and by ISD, one after the other, and what that gave."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_idlm.cli.screen import fail, out

PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Explain in simple words how plants make their food.",
    "Who was Ada Lovelace? Answer in two sentences.",
    "Write a short story about a lighthouse keeper.",
)
_CPU_KV_BYTES = 400_000_000  # vLLM's CPU build would take 90% of the machine's memory


def demo(
    model: Annotated[str, typer.Option(help="Zoo name (`idlm models`), hub id or folder.")] = "smollm2-135m-risd",
    n: Annotated[int | None, typer.Option(min=2, max=16, help="Stride. Default: the zoo's.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Most tokens of an answer.")] = 128,
    prompts: Annotated[Path | None, typer.Option(help="File of prompts, one a line. Default: four of ours.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy, where answers can be compared.")] = 0.0,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="float32 rules out ties. Default: the zoo's.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here, with provenance.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what vLLM prints.")] = False,
) -> None:
    """Decode the same prompts plainly and by ISD, show both as they come, and compare."""
    from vllm_idlm.cli import _run, child, report
    from vllm_idlm.settings import METHOD

    asked = _prompts(prompts)
    engine = engine_options(model, tokens, batch, dtype)
    speculation = {"method": METHOD, **({} if n is None else {"n": n})}
    try:
        _make_embedded(model)
        run = _run.Run(engine, asked, tokens, temperature, min(batch, len(asked)))
        plain = _show("plain", run, verbose)
        run.engine = {**engine, "speculative_config": speculation}
        run.reference = None if temperature else [answer["token_ids"] for answer in plain.answers]
        isd = _show("ISD", run, verbose)
    except child.RunError as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    report.show(plain, isd, temperature, dtype)
    if json_file is not None:
        report.write(json_file, plain, isd, {**asdict(run), "reference": None})
        out.print(f"Written to {json_file}", style="dim", markup=False)


def engine_options(model: str, tokens: int, batch: int, dtype: str | None) -> dict[str, Any]:
    """Keyword arguments of vllm.LLM, the same for both methods."""
    from vllm_idlm import zoo

    options = {"model": model, "max_model_len": max(1024, 2 * tokens), "max_num_seqs": batch, "seed": 0}
    if dtype is not None:
        options["dtype"] = dtype
    entry = zoo.resolve(model)
    if entry is not None and entry.model.startswith(zoo.EMBEDDED):
        options["kv_cache_memory_bytes"] = _CPU_KV_BYTES
    return options


def _prompts(file: Path | None) -> list[str]:
    if file is None:
        return list(PROMPTS)
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--prompts {file}: {error}; give a text file with one prompt a line", 2)
    found = [line for line in lines if line]
    if not found:
        fail(f"--prompts {file}: it holds no prompt; write one a line", 2)
    return found


def _make_embedded(model: str) -> None:
    """Make the embedded model here, where its progress bar can be seen, rather than in the engine's process."""
    from vllm_idlm import embedded, zoo

    try:
        entry = zoo.resolve(model)
        if entry is not None and entry.model.startswith(zoo.EMBEDDED):
            embedded.ensure()
    except (embedded.EmbeddedModelError, zoo.ZooError) as error:
        fail(str(error))


def _show(name: str, run: Any, verbose: bool) -> Any:
    """Run one method with its answers on the screen, in the order of the prompts."""
    from vllm_idlm.cli import child
    from vllm_idlm.cli.stream import Stream

    out.rule(f"[bold]{name}[/bold]", align="left")
    stream = Stream(run.prompts, out)
    with out.status(f"{name}: starting the engine") as status:
        began = time.perf_counter()

        def on_phase(words: str) -> None:
            status.update(f"{name}: {words}")
            if not out.is_terminal and words != "decoding":
                out.print(f"{words} ...", style="dim")
            if words == "decoding":
                status.stop()
                out.print(f"engine ready after {time.perf_counter() - began:.0f} s", style="dim")
                stream.begin()

        outcome = child.run(run, on_phase, stream.take, verbose)
    out.print()
    return outcome
