"""Which rank and which layers a draft adapter needs: shapes trained by one recipe, acceptance against size.

    python -m benchmarks.adapter_shape DATA .. --out FOLDER [--shapes all:8,all:16,..] [--config smollm2-135m-shape]

A shape is LAYERS:RANK, with :SEED behind it for another seed. Every shape sees the same samples in the same order and
the same blocks, as many steps and one rate, scaled by alpha / rank = 2. Measured on the held-out samples of DATA's
folders, each at the temperature that it was drawn at: acceptance by position (of the drafts that are there, and given
that those before were accepted), alpha and the forecast of TPF. Size is that of the file that vLLM loads. A shape whose
folder is complete is not trained again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import common
from vllm_idlm.cli.train import config_file
from vllm_idlm.data import samples as reader
from vllm_idlm.training import acceptance, config, start
from vllm_idlm.training.export import RECORD

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
LAYERS = {"all": [*ATTENTION, *MLP], "attention": ATTENTION, "mlp": MLP, "no-down": [*ATTENTION, *MLP[:2]]}
SHAPES = "all:32,all:8,all:64,attention:32,mlp:32,all:16,attention:64,all:32:1"
TEMPERATURES = (0.0, 1.0)


def settings(name: str, args: argparse.Namespace) -> config.Config:
    """The recipe with the adapter of a shape."""
    layers, rank, seed = [*name.split(":"), "0"][:3]
    own = [f"adapter.rank={rank}", f"adapter.alpha={2 * int(rank)}", f"adapter.targets={LAYERS[layers]}"]
    folders = [f"out={args.out / name.replace(':', '-')}", f"data={args.data}", f"seed={seed}"]
    return config.load(config_file(args.config), [*own, *folders, *args.set])


def trained(made: config.Config) -> Path:
    """The folder of the trained adapter; a run that was interrupted goes on."""
    final = Path(made.out) / "final"
    if (final / RECORD).is_file():
        return final
    base = start.base(made)
    run = start.run(made, base, *start.samples(made, None), lambda *_: None)
    run.resume()
    run.train()
    return run.export()


def measured(model: Any, mask: int, held: list, masks: int, most: int) -> dict[str, Any]:
    """Acceptance by position and the forecast of TPF at each temperature."""
    found = {}
    for temperature in TEMPERATURES:
        own = start.cut([s for s in held if s.temperature == temperature], 256, "held-out samples")[:most]
        rates = list(acceptance.rates(model, own, masks, mask, (temperature,)))
        table = acceptance.forecast(rates, temperature, masks).table()
        table["covered_tpf"] = acceptance.forecast(rates, temperature, masks, True).tpf
        found[f"{temperature:g}"] = {
            "samples": len(own), "alpha": acceptance.overlaps(rates, temperature, masks), **table
        }  # fmt: skip
    return found


def row(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One shape: trained, then measured."""
    made = settings(name, args)
    folder = trained(made)
    record = json.loads((folder / RECORD).read_text())
    model, _, mask = start.for_evaluation(made.model, str(folder), None, made.dtype)
    held = reader.read([path for path in made.data if Path(path).is_dir()], "eval", None)
    return {
        "shape": name,
        "megabytes": round((folder / "adapter_model.safetensors").stat().st_size / 1e6, 2),
        "mask_tokens": record["mask_tokens_trained"],
        "seconds": record["seconds"],
        "held_out": measured(model, mask, held, made.stride - 1, args.samples),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown: size, alpha by position at temperature 1, forecast of TPF."""
    lines = ["| shape | MB | alpha 1 / 2 / 3 | TPF, temperature 1 | TPF, greedy |", "| --- | --- | --- | --- | --- |"]
    for one in rows:
        greedy, drawn = one["held_out"]["0"], one["held_out"]["1"]
        alpha = " / ".join(f"{value:.3f}" for value in drawn["alpha"])
        lines.append(
            f"| {one['shape']} | {one['megabytes']:.1f} | {alpha} | {drawn['tpf']:.3f} | {greedy['tpf']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="folders (with held-out samples) and files, as `idlm data` writes them")
    parser.add_argument("--out", type=Path, default=Path("runs/shape"))
    parser.add_argument("--config", default="smollm2-135m-shape")
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--samples", type=int, default=40, help="most held-out samples of a temperature")
    parser.add_argument("--set", action="append", default=[], help="key=value over the recipe")
    parser.add_argument("--name", default="adapter-shape", help="results/NAME.json")
    args = parser.parse_args()
    rows = []
    for name in args.shapes.split(","):
        rows.append(row(name, args))
        tpf = {t: round(found["tpf"], 3) for t, found in rows[-1]["held_out"].items()}
        print({**{k: v for k, v in rows[-1].items() if k != "held_out"}, "tpf": tpf}, flush=True)
        path = common.save(args.name, {"recipe": args.config, "n": settings(name, args).stride, "rows": rows})
    print(path, table(rows), sep="\n")


if __name__ == "__main__":
    main()
