"""The planner as one web page that needs no network: `idlm plan --html`.

The page's script repeats `planner.Plan.step_ms`, `planner.tpf` and `planner.Plan.best`; sizes of models, figures of
devices and measured points go in as tables. `checks` go with them: the planner's own answers at many points, which the
page recomputes when it is opened and says if it disagrees.
"""

from __future__ import annotations

import itertools
import json
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from vllm_idlm import __version__, measured, planner

_DATA = "/*DATA*/null"
_NAMES = {"qwen3-8b": "Qwen3-8B / I-DLM-8B", "qwen3-32b": "Qwen3-32B / I-DLM-32B", "smollm2-135m": "SmolLM2-135M"}
RANKS = (0, 32, 128)


def model_table(shape: planner.Shape) -> dict[str, float]:
    """What the page needs of a model."""
    queries, _ = shape.heads
    return {
        "params": shape.params, "bytes": shape.bytes_per_value, "kv_bytes": shape.kv_bytes, "queries": queries,
        "hidden": shape.hidden_size, "layers": shape.num_hidden_layers, "vocab": shape.vocab_size,
        "lora_per_rank": shape.lora_params(1),
    }  # fmt: skip


def hardware_table() -> dict[str, dict[str, Any]]:
    """The shipped devices by name."""
    folder = Path(str(files("vllm_idlm.configs"))) / "hardware"
    return {p.stem: planner.hardware(p.stem).model_dump() for p in sorted(folder.glob("*.yaml"))}


def checks(shapes: dict[str, planner.Shape], devices: dict[str, planner.Hardware]) -> list[dict[str, Any]]:
    """The planner's answers, spread over every slider."""
    found = []
    for (model, shape), (name, device) in itertools.product(shapes.items(), devices.items()):
        for tp, context, rank, requests in ((1, 1000, 0, 1), (2, 4096, 128, 8), (1, 128, 32, 64), (4, 32768, 0, 512)):
            plan = planner.Plan(shape, device, tp, context, rank)
            for n, groups, rates in (
                (1, 0, [0.9]),
                (4, 0, [0.9]),
                (4, 3, [0.5, 0.4, 0.3]),
                (8, 2, [0.8]),
                (16, 0, [0.98]),
            ):
                point = plan.point(requests, n, spread(rates, n - 1), groups)
                best = plan.best(requests, spread(rates, 7), extra=True)
                state = {"model": model, "hardware": name, "tp": tp, "context": context, "rank": rank}
                state |= {"requests": requests, "n": n, "groups": groups, "rates": rates}
                expect = {k: point[k] for k in ("ms", "OH", "TPF", "tokens_per_s", "speedup")}
                expect["memory"] = sum(plan.memory(requests, n).values())
                found.append({**state, "expect": expect, "best": [best["n"], best["groups"], best["tokens_per_s"]]})
    return found


def spread(rates: list[float], places: int) -> list[float]:
    """Acceptances by place: the last one given stands for all places behind it."""
    return [rates[min(i, len(rates) - 1)] for i in range(places)]


def tables(
    start: dict[str, Any], shape: planner.Shape, device: planner.Hardware, results: Path | None
) -> dict[str, Any]:
    """All that the page holds. start: the sliders at first (model, hardware, rates, n, groups, requests, ..)."""
    shapes = {name: planner.shape(name) for name in planner.SHAPES} | {start["model"]: shape}
    devices = {name: planner.Hardware(**found) for name, found in hardware_table().items()} | {
        start["hardware"]: device
    }
    points = [{**p.table(), "model": planner.ZOO.get(p.model, p.model)} for p in measured.points(results)]
    return {
        "version": __version__, "date": datetime.now(UTC).date().isoformat(), "start": start,
        "models": {name: {"label": _NAMES.get(name, name), **model_table(s)} for name, s in shapes.items()},
        "hardware": {name: d.model_dump() for name, d in devices.items()},
        "ranks": sorted({*RANKS, start["rank"]}), "points": points, "checks": checks(shapes, devices),
    }  # fmt: skip


def page(found: dict[str, Any]) -> str:
    """The page with its tables in it."""
    template = (Path(__file__).parent / "explorer.html").read_text(encoding="utf-8")
    if template.count(_DATA) != 1:
        raise planner.PlanError(f"explorer.html must hold {_DATA} once; this installation is damaged")
    return template.replace(_DATA, json.dumps(found).replace("</", "<\\/"))
