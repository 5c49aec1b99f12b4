"""The model card of a run's result, and its training curve."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write(folder: Path, record: dict[str, Any], metrics: Path) -> None:
    """README.md and curve.png beside the weights, from isd.json's content and the run's metrics.jsonl."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    evaluations = [line for line in lines if line["event"] == "eval"]
    curve = _curve(lines, evaluations, folder / "curve.png")
    (folder / "README.md").write_text(card(record, evaluations, curve), encoding="utf-8")


def card(record: dict[str, Any], evaluations: Sequence[dict[str, Any]], curve: bool) -> str:
    """The card as Markdown."""
    gated = record["form"] == "gated"
    what = "A gated LoRA draft adapter" if gated else "A full introspective conversion"
    config = record["config"]
    loss = " + ".join(f"{weight:g} {name}" for name, weight in config["loss"].items() if weight)
    serve = f'"method": "isd", "n": {record["stride"]}' + (', "lora": "THIS FOLDER"' if gated else "")
    rows = "\n".join(
        f"| {e['mask_tokens_trained']} | {' / '.join(f'{a:.3f}' for a in e['alpha'])} | {e['tpf']:.3f} |"
        for e in evaluations
    )
    minutes = record["seconds"] / 60
    trained = f"{record['mask_tokens_trained']} mask tokens, {record['steps']} steps, {minutes:.0f} minutes"
    return f"""# {what} for {record["base"]}

For introspective strided decoding with vllm-idlm: it fills mask slots{", and acts nowhere else" if gated else ""}.

```bash
vllm serve MODEL --speculative-config '{{{serve}}}'
```

| | |
| --- | --- |
| base | {record["base"]} (fingerprint {record["base_fingerprint"][:12]}) |
| stride, mask token | {record["stride"]}, {record["mask_token_id"]} |
| trained on | {trained} |
| loss | {loss} |
| goes on from | {_origin(config) if gated else "the base"} |

Held-out prompts, temperature 1: mean of sum min(p, q) at each mask slot, and the forecast of tokens per forward.

| mask tokens | alpha by slot | TPF |
| --- | --- | --- |
{rows}
{"" if not curve else chr(10) + "![training curve](curve.png)" + chr(10)}
The whole configuration and the versions are in isd.json. Licence: that of the base model.
"""


def _origin(config: dict[str, Any]) -> str:
    init = config["adapter"]["init"]
    return f"the adapter {init}" if init else "nothing: a new adapter"


def _curve(lines: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]], file: Path) -> bool:
    """Draw alpha against mask tokens; False without matplotlib or without steps."""
    steps = [line for line in lines if line["event"] == "step"]
    try:
        import matplotlib
    except ImportError:
        return False
    if not steps:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot([s["mask_tokens_trained"] for s in steps], [s["alpha"] for s in steps], lw=0.6, alpha=0.5, label="batch")
    for depth in range(len(evaluations[0]["alpha"]) if evaluations else 0):
        points = [(e["mask_tokens_trained"], e["alpha"][depth]) for e in evaluations]
        axes.plot(*zip(*points, strict=True), "o-", label=f"held out, slot {depth + 1}")
    axes.set(xlabel="mask tokens", ylabel="alpha", ylim=(0, 1))
    axes.legend()
    figure.savefig(file, dpi=100)
    pyplot.close(figure)
    return True
