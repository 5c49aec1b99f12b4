"""`idlm doctor --engine`: whether this machine decodes with ISD exactly as without, found out by decoding.

The drafts of ISD are forced right and wrong in turn, so that both sides of verification run whatever the model's own
drafts are like: accepted drafts must be in the cache at their places, rejected ones and masks must leave nothing there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_idlm.cli import child, provenance
from vllm_idlm.cli._canary import RIGHT, WRONG, Asked, Case, Found
from vllm_idlm.cli._run import parting
from vllm_idlm.cli.screen import fail, out

_ITEMS = " ".join(f"Item {i} costs {37 * i % 91} coins." for i in range(1, 41))
PROMPTS = [
    [
        "Count from one to twenty in words.",
        f"{_ITEMS} List the items that cost more than fifty coins, with their prices.",
        "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    ],
    ["Explain in simple words how plants make their food."],  # alone
]
_TOKENS = 32  # of an answer at least
_TIE = 0.25  # of log-probabilities: two steps of a bfloat16 logit of 16 or more, as in the demo
_FLOAT32_TIE = 0.001
_REFUSED = '"coverage": extra groups'  # vllm_idlm.tail: this engine's attention cannot have them


@dataclass(frozen=True)
class Options:
    """What the command line says; None: not given."""

    model: str
    lora: str | None = None
    mask_token_id: int | None = None
    n: int | None = None
    dtype: str | None = None
    compiled: bool | None = None
    engine_args: str | None = None


@dataclass(frozen=True)
class Parting:
    """Where an answer leaves plain decoding's: numbers count from 1."""

    prompt: int
    token: int
    plain: str
    isd: str
    logprobs: list[float] | None
    tie: bool  # the model itself can hardly tell the two tokens apart


@dataclass(frozen=True)
class Verdict:
    """Whether to serve with ISD here, and why, in one sentence."""

    good: bool
    sentence: str


def asked(options: Options) -> Asked:
    """What the first engine is to do. Raises ValueError, naming the option and the fix."""
    from vllm_idlm import zoo
    from vllm_idlm.settings import METHOD

    engine = {"model": options.model, **_engine_args(options.engine_args)}
    own = engine.pop("speculative_config", {})
    given = {"lora": options.lora, "mask_token_id": options.mask_token_id, "n": options.n}
    speculation = {"method": METHOD, "coverage": "all", **own, **{k: v for k, v in given.items() if v is not None}}
    if options.dtype is not None:
        engine["dtype"] = options.dtype
    entry = zoo.resolve(options.model)
    stride = speculation.get("n") or (entry.n if entry else 4)
    tokens = 1 + stride * -(-(_TOKENS - 1) // stride)  # one from the prompt, then n from every forward
    embedded = entry is not None and entry.model.startswith(zoo.EMBEDDED)
    return Asked(engine, PROMPTS, tokens, speculation, embedded=embedded, compiled=options.compiled)


def _engine_args(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"--engine-args {text}: no JSON ({error}); give '{{\"tensor_parallel_size\": 2}}'") from None
    if not isinstance(found, dict) or not isinstance(found.get("speculative_config", {}), dict):
        raise ValueError(f"--engine-args {text}: give a JSON object of vLLM's engine arguments, names with underscores")
    return found


# -- judging


def partings(plain: Case, case: Case, dtype: str) -> dict[int, Parting]:
    """By prompt (from 0), where the answers of `case` leave plain decoding's."""
    found, limit = {}, _FLOAT32_TIE if dtype == "float32" else _TIE
    for i, (want, got) in enumerate(zip(plain.answers, case.answers, strict=True)):
        at, margin = parting(want, got), case.margins[i]
        if at is not None:
            texts = (c.pieces[i][at] if at < len(c.pieces[i]) else "" for c in (plain, case))
            tie = margin is not None and abs(margin[0] - margin[1]) <= limit
            found[i] = Parting(i + 1, at + 1, *texts, margin, tie)
    return found


def equal_tokens(plain: Case, case: Case) -> int:
    """Tokens in front of the first that differs, over all answers."""
    pairs = zip(plain.answers, case.answers, strict=True)
    return sum(len(want) if (at := parting(want, got)) is None else at for want, got in pairs)


def misjudged(case: Case, parted: dict[int, Parting], settings: dict[str, Any]) -> str | None:
    """The first forced draft that was not treated as it had to be, in words. Past a parting anything may happen."""
    tokens, full = len(case.answers[0]), settings["coverage"] != "auto" and not settings["schedule"]
    for i in range(len(case.forwards)):
        end = parted[i].token - 1 if i in parted else tokens
        for place, drafts, accepted, emitted in forwards_of(case, i):
            if place + emitted > end:
                break
            use = min(settings["n"] - 1, tokens - place - 1)
            where = f"prompt {i + 1}, token {place + accepted + 1}"
            if case.name == RIGHT and accepted < min(drafts, use):
                return f"the right draft of {where} was rejected"
            if case.name == RIGHT and full and drafts < use:
                return f"{drafts} drafts instead of {use} were verified at {where}"
            if case.name == WRONG and accepted:
                return f"{accepted} wrong drafts in front of {where} were accepted"
    return None if figures(case).drafted else "no draft was verified at all"


class Figures(NamedTuple):
    """What the forwards of a case made."""

    tpf: float | None  # tokens per forward
    drafted: int  # drafts that were verified
    accepted: int  # of these


def forwards_of(case: Case, prompt: int) -> Iterator[tuple[int, int, int, int]]:
    """Tokens that the answer had, drafts, accepted, emitted, of each of its forwards. With asynchronous scheduling
    vLLM runs one more, behind the answer's end; it is left out."""
    place = 1  # the first token is of the prompt's forward
    for drafts, accepted, emitted in case.forwards[prompt]:
        if place < len(case.answers[prompt]):
            yield place, drafts, accepted, emitted
        place += emitted


def figures(case: Case) -> Figures:
    """By the forwards where they were recorded (drafts were forced), else by what ISD counted."""
    if not case.forwards:
        drafted, accepted = (sum(case.stats[f"{word}_per_position"]) for word in ("drafted", "accepted"))
        return Figures(case.stats["tpf"], drafted, accepted)
    ran = [forward for i in range(len(case.forwards)) for forward in forwards_of(case, i)]
    emitted = sum(len(answer) - 1 for answer in case.answers)
    tpf = emitted / len(ran) if ran else None
    return Figures(tpf, sum(drafts for _, drafts, *_ in ran), sum(accepted for _, _, accepted, _ in ran))


def judge(plain: Found, isd: Found) -> Verdict:
    """What the answers say. The first fault decides."""
    reference, ties = plain.cases[0], 0
    for case in isd.cases:
        parted = partings(reference, case, isd.machine["dtype"])
        for found in parted.values():
            if not found.tie:
                return Verdict(False, f"NOT exact: {_parts(case, found)}. {_stop()}")
        fault = misjudged(case, parted, isd.machine["settings"])
        if fault:
            return Verdict(False, f"NOT in order: with drafts {case.name}, {fault}. {_stop()}")
        ties += len(parted)
    return Verdict(True, _good(reference, isd, ties))


def _parts(case: Case, found: Parting) -> str:
    close = "" if found.logprobs is None else " (log-probabilities {1:.2f} and {0:.2f})".format(*found.logprobs)
    return (
        f"with drafts {case.name}, prompt {found.prompt} parts from plain decoding at token {found.token} "
        f"({found.isd!r} instead of {found.plain!r}){close}"
    )


def _stop() -> str:
    return "Do not serve with ISD on this machine; please report it with this output."


def _good(reference: Case, isd: Found, ties: int) -> str:
    total, m = sum(map(len, reference.answers)), isd.machine
    here = f"(vLLM {m['vllm']}, Model Runner {m['runner']}, {m['device']}, {m['dtype']}, {m['mode']})"
    runs = f"each of {len(isd.cases)} runs"
    if not ties:
        return f"This machine decodes with ISD exactly as without: {total} of {total} tokens equal in {runs} {here}."
    equal = min(equal_tokens(reference, case) for case in isd.cases)
    answers = len(isd.cases) * len(reference.answers)
    return (
        f"This machine decodes with ISD as without, up to ties: at least {equal} of {total} tokens equal in {runs}; "
        f"{ties} of {answers} answers part where the model gives two tokens the same probability within the rounding "
        f"of {m['dtype']}, as plain decoding does at another batch size {here}."
    )


# -- running


def run(options: Options, json_file: Path | None, verbose: bool) -> bool:
    """Run both engines with their progress on the screen, print what came of it, and return whether all is well."""
    try:
        what = asked(options)
        _make_embedded(what)
        plain, isd = _both(what, verbose)
    except (ValueError, child.RunError) as error:
        fail(str(error))
    verdict = judge(plain, isd)
    out.print(table(plain, isd))
    for line in _ties(plain, isd):
        out.print(line, style="dim", markup=False, soft_wrap=True)
    out.print(verdict.sentence, style="green" if verdict.good else "bold red", markup=False, soft_wrap=True)
    if json_file is not None:
        runs = {"plain": asdict(plain), "isd": asdict(isd)}
        record = {"provenance": provenance.collect(), "asked": asdict(options), **asdict(verdict), **runs}
        json_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        out.print(f"Written to {json_file}", style="dim", markup=False)
    return verdict.good


def _make_embedded(what: Asked) -> None:
    """Make the embedded model here, where its progress bar can be seen."""
    from vllm_idlm import embedded

    if what.embedded:
        try:
            embedded.ensure()
        except embedded.EmbeddedModelError as error:
            raise ValueError(str(error)) from None


def _both(what: Asked, verbose: bool) -> tuple[Found, Found]:
    began = time.perf_counter()
    plain = _engine("plain decoding", what, began, verbose)
    what.batches, what.reference = plain.prompts, plain.cases[0].answers
    try:
        return plain, _engine("ISD", what, began, verbose)
    except child.RunError as error:
        if _REFUSED not in str(error) or what.speculation["coverage"] != "all":
            raise
    out.print('This engine\'s attention has no extra groups of masks: once more with "coverage": "last"', style="dim")
    what.speculation["coverage"] = "last"
    return plain, _engine("ISD", what, began, verbose)


def _engine(name: str, what: Asked, began: float, verbose: bool) -> Found:
    """One engine, each of its phases a line with the seconds since `began`, and a clock while it lasts."""
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal or verbose) as progress:
        task = progress.add_task(f"{name}: starting its process")

        def on_phase(words: str) -> None:
            seconds = time.perf_counter() - began
            progress.reset(task, description=f"{name}: {words}")
            out.print(f"{seconds:4.0f} s  {name}: {words}", style="dim", markup=False)

        found = Found(**child.work("_canary", what, on_phase, lambda *_: None, verbose))
    found.cases = [Case(**case) for case in found.cases]
    return found


def table(plain: Found, isd: Found) -> Table:
    """The cases side by side."""
    made = Table(
        "drafts", "equal answers", "equal tokens", "tokens per forward", "drafts accepted", header_style="bold"
    )
    for column in made.columns[1:]:
        column.justify = "right"
    reference = plain.cases[0]
    total = sum(map(len, reference.answers))
    for case in isd.cases:
        same = sum(a == b for a, b in zip(case.answers, reference.answers, strict=True))
        made_of = figures(case)
        tpf = "-" if made_of.tpf is None else f"{made_of.tpf:.2f}"
        equal, kept = f"{equal_tokens(reference, case)} of {total}", f"{made_of.accepted} of {made_of.drafted}"
        made.add_row(case.name, f"{same} of {len(case.answers)}", equal, tpf, kept)
    return made


def _ties(plain: Found, isd: Found) -> Iterator[str]:
    for case in isd.cases:
        for found in partings(plain.cases[0], case, isd.machine["dtype"]).values():
            if found.tie:
                yield f"a tie: {_parts(case, found)}"
