"""`idlm eval-acceptance`: what a model or an adapter will give in serving, measured on texts without serving them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_idlm.cli.screen import fail, numbers, out


def eval_acceptance(
    data: Annotated[list[str], typer.Argument(help="Folders or files of samples (see `idlm data`).")],
    model: Annotated[str, typer.Option(help="Zoo name, hub id or folder of the base model.")] = "smollm2-135m-risd",
    lora: Annotated[str | None, typer.Option(help="Adapter folder; default: the zoo entry's. 'none': without.")] = None,
    mask_token_id: Annotated[int | None, typer.Option(help="Default: the adapter's, else the zoo's.")] = None,
    split: Annotated[str, typer.Option(help="Split of data folders: train, eval.")] = "eval",
    strides: Annotated[str, typer.Option(help="Strides n to forecast.")] = "2,3,4,6,8,12,16",
    temperatures: Annotated[str, typer.Option(help="Each on the samples that were drawn at it.")] = "0,0.7,1.0",
    samples: Annotated[int, typer.Option(min=1, help="Most samples of a temperature.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=16, help="Longest sample; answers beyond it are cut.")] = 512,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    to: Annotated[Path | None, typer.Option(help="Folder for acceptance.json and acceptance.png.")] = None,
) -> None:
    """Acceptance by position and expected tokens per forward, for several strides and temperatures."""
    from vllm_idlm.data.errors import DataError

    try:
        wanted = sorted({int(n) for n in numbers("--strides", strides, 2, 16)})
        heats = numbers("--temperatures", temperatures, 0, 10)
        found = _measure(
            data, model, lora, mask_token_id, split, wanted, heats,
            samples, max_tokens, dtype,
        )  # fmt: skip
    except (DataError, ValueError, OSError) as error:
        fail(str(error), 2)
    _table(found)
    if to is not None:
        to.mkdir(parents=True, exist_ok=True)
        (to / "acceptance.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        plot(found, to / "acceptance.png")
        out.print(f"Written to {to}", markup=False)


def _measure(data, model, lora, mask, split, strides, temperatures, most, max_tokens, dtype) -> dict[str, Any]:
    from rich.progress import track

    from vllm_idlm.data import samples as reader
    from vllm_idlm.data.model import tokenizer_if_any
    from vllm_idlm.training import acceptance, start

    loaded, folder, mask = start.for_evaluation(model, lora, mask, dtype)
    made = reader.read(data, split, tokenizer_if_any(folder))
    masks, rows = max(strides) - 1, []
    for temperature in temperatures:
        own = [s for s in made if s.temperature == temperature]
        chosen = start.cut(own or made, max_tokens, str(data))[:most]
        start.check_tokens(chosen, loaded.config.vocab_size, str(data))
        shown = track(chosen, f"temperature {temperature:g}", console=out, transient=True)
        measured = list(acceptance.rates(loaded, shown, masks, mask, (temperature,)))
        alpha = acceptance.overlaps(measured, temperature, masks)
        rows.append({
            "temperature": temperature,
            "drawn_at_it": bool(own),
            "samples": len(measured),
            "alpha": alpha,
            "strides": {n: acceptance.forecast(measured, temperature, n - 1).table() for n in strides},
            "covered": {n: acceptance.forecast(measured, temperature, n - 1, True).table() for n in strides},
        })  # fmt: skip
    return {"model": model, "lora": lora, "data": list(data), "split": split, "dtype": dtype, "rows": rows}


def _table(found: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(
        "temperature", "n", "TPF", "covered", "cold", "acceptance by position (given those before)", "alpha", "samples"
    )
    for row in found["rows"]:
        for n, figures in row["strides"].items():
            accepted = " ".join(
                f"{a:.2f} ({c:.2f})" for a, c in zip(figures["acceptance"][:4], figures["conditional"], strict=False)
            )
            alpha = " ".join(f"{a:.2f}" for a in row["alpha"][: min(n - 1, 4)])
            note = "" if row["drawn_at_it"] else " *"
            cells = (f"{row['temperature']:g}{note}", n, f"{figures['tpf']:.3f}")
            cells += (f"{row['covered'][n]['tpf']:.3f}", f"{figures['cold']:.0%}")
            table.add_row(*map(str, cells), accepted, alpha, str(row["samples"]))
    out.print(table)
    out.print("TPF: with the last outcome covered (cold forwards after a rejection); covered: with coverage all")
    if not all(row["drawn_at_it"] for row in found["rows"]):
        out.print("* no sample was drawn at this temperature: all were taken, and the forecast is rough")


def plot(found: dict[str, Any], file: Path) -> None:
    """alpha by position, and TPF by stride, one line a temperature."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for row in found["rows"]:
        label = f"temperature {row['temperature']:g}"
        left.plot(range(1, len(row["alpha"]) + 1), row["alpha"], "o-", label=label)
        line = right.plot(list(row["strides"]), [f["tpf"] for f in row["strides"].values()], "o-", label=label)
        all_covered = [f["tpf"] for f in row["covered"].values()]
        right.plot(list(row["covered"]), all_covered, "o--", color=line[0].get_color())
    left.set(xlabel="mask slot", ylabel="alpha", ylim=(0, 1), title="Acceptance by mask slot")
    right.set(xlabel="stride n", ylabel="tokens per forward", title="Forecast (dashed: coverage all)")
    left.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
