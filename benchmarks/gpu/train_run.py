"""`idlm train` with training_patches.py in place.

train_run.py CONFIG key=value ..                 as `idlm train`
train_run.py --fit SECONDS CONFIG key=value ..   measures a few steps first; sets `steps` to what SECONDS hold
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jobs

# isort: split
import torch
import training_patches

from vllm_idlm.training import config as configs
from vllm_idlm.training import start

NEVER = 10**6
SPARE = 15  # seconds of --fit that the end of a run takes: evaluation, export
EVAL = ("step", "mask_tokens_trained", "alpha", "tpf", "cold")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--fit", type=float, help="seconds that all may take")
    made.add_argument("--measure", type=float, default=8.0, help="seconds of the steps that --fit measures, at least")
    made.add_argument("config", help="a YAML file, or the name of one in configs/train")
    made.add_argument("overrides", nargs="*", help="key=value")
    return made


def load(name: str, overrides: list[str]) -> configs.Config:
    """The configuration."""
    from vllm_idlm.cli.train import config_file

    return configs.load(config_file(name), overrides)


def report(event: str, values: dict[str, Any]) -> None:
    """Say how it goes, and write evaluations down."""
    if event == "eval":
        found = {name: values[name] for name in EVAL if name in values}
        print("eval", json.dumps(found), flush=True)
        jobs.result({"job": "train-eval", **found})
    elif event == "step" and values["step"] % 25 == 0:
        what = f"step {values['step']} loss {values['loss']:.3f} alpha {values['alpha']:.3f} {values['speed']:.0f}/s"
        print(what, flush=True)


def run_of(config: configs.Config) -> Any:
    """The run of a configuration."""
    from vllm_idlm.data.model import tokenizer_if_any

    base = start.base(config)
    return start.run(config, base, *start.samples(config, tokenizer_if_any(Path(base.folder))), report)


def marks(run: Any, measure: float, limit: float) -> list[float]:
    """Times at which steps ended: of nine at least, over `measure` seconds at least, or for `limit` seconds."""
    began, found = time.time(), []
    run.out.mkdir(parents=True, exist_ok=True)
    for i, batches in enumerate(run.stream.steps(0)):
        run._step(batches)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.time())
        if (i >= 8 and found[-1] - found[0] > measure) or time.time() - began > limit:
            break
    return found


def fitted(config: configs.Config, fit: float, measure: float) -> configs.Config:
    """The configuration with as many steps as fit into `fit` seconds from now, this measurement among them."""
    began = time.time()
    other = {"out": config.out + "-trial", "steps": 30, "eval_every": NEVER, "save_every": NEVER, "stop_minutes": None}
    run = run_of(config.model_copy(update=other))
    run.figures = (0, {})  # no evaluation at step 0
    found = marks(run, measure, 0.25 * fit + 60)
    last = found[-7:]  # the first ones compile
    each, masks = (last[-1] - last[0]) / max(1, len(last) - 1), run.mask_tokens / run.step
    left = max(1.0, fit - (time.time() - began) - SPARE)
    steps = max(20, int(0.93 * left / max(each, 1e-3)))
    note = {
        "job": "train-fit", "compile_s": round(found[0] - began, 1), "step_s": round(each, 4),
        "mask_tokens_per_step": round(masks), "mask_tokens_per_s": round(masks / max(each, 1e-3)), "steps": steps,
    }  # fmt: skip
    if torch.cuda.is_available():
        note["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    print(json.dumps(note), flush=True)
    jobs.result(note)
    return config.model_copy(
        update={
            "steps": steps,
            "eval_every": max(1, steps // 4),
            "save_every": max(1, steps // 3),
            "stop_minutes": left / 60,
        }
    )


def main() -> None:
    """Train, and write down what came of it."""
    args = parser().parse_args()
    config = load(args.config, args.overrides)
    training_patches.apply(config)
    jobs.gate()
    began = time.time()
    if args.fit:
        config = fitted(config, args.fit, args.measure)
    run = run_of(config)
    if run.resume():
        print("going on from step", run.step)
    complete, folder = run.train(), run.export()
    held_out = run.figures[1]
    found = {"complete": complete, "steps": run.step, "mask_tokens": run.mask_tokens, "folder": str(folder)}
    found |= {"seconds": round(time.time() - began, 1), "alpha": held_out.get("alpha"), "tpf": held_out.get("tpf")}
    jobs.result({"job": "train-done", **found})
    print("written to", folder, flush=True)


if __name__ == "__main__":
    main()
