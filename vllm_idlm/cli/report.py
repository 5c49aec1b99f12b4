"""The demo's closing table, its verdict in words, and the record it writes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from vllm_idlm.cli import compare, provenance
from vllm_idlm.cli._run import Outcome
from vllm_idlm.cli.screen import out


def show(plain: Outcome, isd: Outcome, temperature: float, dtype: str | None) -> None:
    """Print the table, whether the answers are the same, how the adapter was made, and the verdict."""
    out.print(table(plain, isd))
    for line in [*sameness(plain, isd, temperature, dtype), adapter_line(isd.settings), "", verdict(plain, isd)]:
        out.print(line, markup=False)


def table(plain: Outcome, isd: Outcome) -> Table:
    """Both runs side by side."""
    made = Table("", "plain", "ISD", "ISD / plain", header_style="bold")
    for column in made.columns[1:]:
        column.justify = "right"
    made.add_row("tokens", str(compare.tokens(plain)), str(compare.tokens(isd)), "")
    _row(made, "tokens/s", compare.speed(plain), compare.speed(isd), "{:.1f}")
    _row(made, "tokens/s, prompts not counted", compare.decode_speed(plain), compare.decode_speed(isd), "{:.1f}")
    _row(made, "TPF, tokens per forward", compare.tpf(plain), compare.tpf(isd), "{:.2f}")
    _row(made, "ms per forward (OH)", compare.step_ms(plain), compare.step_ms(isd), "{:.1f}")
    counts = isd.isd or {}
    for words, key in (("all drafts accepted", "accepted_all"), ("one rejected", "rejected"), ("cold", "cold")):
        made.add_row(f"forwards: {words}", "", f"{counts[key]} ({_share(counts[key], counts['forwards'])})", "")
    for place, rate in enumerate(compare.acceptance(counts), start=1):
        of = counts["accepted_per_position"][place - 1]
        made.add_row(f"draft {place} accepted", "", f"{of} ({_percent(rate)})", "")
    return made


def _row(made: Table, words: str, plain: float | None, isd: float | None, form: str) -> None:
    ratio = f"{isd / plain:.2f}x" if plain and isd else ""
    made.add_row(words, *("-" if v is None else form.format(v) for v in (plain, isd)), ratio)


def _share(part: int, whole: int) -> str:
    return _percent(part / whole if whole else None)


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.0f}%"


def sameness(plain: Outcome, isd: Outcome, temperature: float, dtype: str | None) -> list[str]:
    """Whether the answers are the same, and each first differing token."""
    if temperature > 0:
        return [
            f"Sampled at temperature {temperature:g}: the answers differ as two plain runs differ; their "
            "distribution is the same."
        ]
    found, total = compare.differences(plain, isd), len(plain.answers)
    lines = [f"Identical answers: {total - len(found)} of {total}."]
    for d in found:
        close = f" (log-probabilities {d.logprobs[0]:.2f} and {d.logprobs[1]:.2f})" if d.logprobs else ""
        lines.append(f"  prompt {d.prompt + 1}, token {d.index + 1}: plain {d.plain!r}, ISD {d.isd!r}{close}")
    if found and dtype != "float32":
        lines.append(
            "  Forwards of different shapes round differently, so a tie may flip (a bfloat16 logit of 16 or more has "
            "steps of 0.125); plain against plain at another batch size does it too. --dtype float32 rules that out."
        )
    elif found:
        lines.append("  In float32 this should not be: please report it, with the file that --json writes.")
    return lines


def adapter_line(settings: dict[str, Any] | None) -> str:
    """How the draft adapter was made, in its own record's words."""
    from vllm_idlm.settings import adapter_record

    lora = (settings or {}).get("lora")
    if not lora:
        return "Drafts come from the served weights themselves (no adapter)."
    record = adapter_record(lora)
    facts = [
        f"{record['mask_tokens_trained']:,} mask tokens" if "mask_tokens_trained" in record else "",
        f"{record['samples']:,} samples" if "samples" in record else "",
        f"{record['seconds'] / 60:.0f} minutes" if "seconds" in record else "",
    ]
    started = ((record.get("config") or {}).get("adapter") or {}).get("init")
    if started:
        facts.append(f"going on from {started}")
    overlap = (record.get("held_out") or {}).get("alpha")
    if isinstance(overlap, list):
        rates = ", ".join(f"{value:.2f}" for value in overlap)
        facts.append(f"held-out overlap with the model, by draft position: {rates}")
    told = "; ".join(fact for fact in facts if fact) or "its isd.json does not say how it was trained"
    return f"Drafts come from the adapter {Path(lora).name}, trained on {told}."


def verdict(plain: Outcome, isd: Outcome) -> str:
    """Whether ISD was faster here, by how much, and why."""
    ratio = compare.speed(isd) / compare.speed(plain)
    tpf, oh = compare.tpf(isd), compare.overhead(plain, isd)
    speeds = f"{compare.speed(isd):.1f} against {compare.speed(plain):.1f} tokens/s"
    if tpf is None or oh is None:
        return f"{speeds}: too few tokens to say more."
    why = f"A forward gives {tpf:.2f} tokens and takes {oh:.2f} times as long as a plain one."
    if ratio >= 1:
        return f"ISD was faster here: {speeds}, {ratio:.2f} times. {why}"
    slow = "a forward takes too long here (a busy machine, or more rows than it computes in one go)"
    what = slow if oh >= 1.5 else "the drafts are accepted too rarely (a better adapter raises TPF)"
    return f"ISD was NOT faster here: {speeds}, {ratio:.2f} times. {why} It is faster when TPF exceeds OH: {what}."


def write(file: Path, plain: Outcome, isd: Outcome, asked: dict[str, Any]) -> None:
    """Write both outcomes, the figures made of them, what was asked, and where it was run."""
    figures = {
        "speedup": compare.speed(isd) / compare.speed(plain),
        "tpf": compare.tpf(isd),
        "overhead": compare.overhead(plain, isd),
        "acceptance": compare.acceptance(isd.isd or {}),
        "differences": [asdict(d) for d in compare.differences(plain, isd)],
    }
    runs = {"plain": asdict(plain), "isd": asdict(isd)}
    record = {"provenance": provenance.collect(), "asked": asked, "figures": figures, **runs}
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
