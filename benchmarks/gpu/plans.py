"""The jobs of each call, by what is worth most: prints one plan as JSON, for jobs.py.

    python3 plans.py first|second|third
    python3 plans.py job NAME METHOD ENGINE_ARGS..     one engine of your own

Call 1 brings vLLM alone, so its engines have made-up weights of Qwen3-8B's shape; SmolLM2 comes with call 2. Of SmolLM2
the engines without graphs come before those with: a failure in capture is told from one in a step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BIG = ("--model", "qwen3-8b", "--synthetic", "0.9", "--batches", "1,8,32")
EAGER = (*BIG, "--eager", "--rounds", "2", "--tokens", "48")
SMOL = ("--model", "smollm2", "--texts", "24", "--tokens", "96", "--batches", "1,4,16", "--rounds", "2")
SMOL_EAGER = (*SMOL, "--eager", "--batches", "16")
SYNC = ("--model", "qwen3-8b", "--layers", "2", "--rank", "16", "--synthetic", "0.9", "--batches", "8", "--eager")
INVARIANT = {"VLLM_BATCH_INVARIANT": "1"}


def job(name: str, limit: int, script: str, *words: str, **more: Any) -> dict[str, Any]:
    """A job that runs a script of this folder."""
    return {"name": name, "limit": limit, "command": [sys.executable, str(HERE / script), *words], **more}


def engine(name: str, limit: int, method: str, *words: str, **more: Any) -> dict[str, Any]:
    """A job that starts one engine."""
    return job(name, limit, "engine.py", "--name", name, "--method", method, *words, **more)


def first() -> list[dict[str, Any]]:
    """Kernels; whether a step waits for the device; plain decoding and ISD at 8B."""
    return [
        job("smoke", 120, "smoke.py"),
        # vLLM raises at whatever makes the host wait inside a step: "no step waits for the device" is checked by it.
        engine("sync-risd", 60, "risd", *SYNC, "--rounds", "1", "--tokens", "24", env={"VLLM_GPU_SYNC_CHECK": "error"}),
        engine("8b-plain", 100, "plain", *BIG),
        engine("8b-isd", 100, "isd", *BIG),
        engine("8b-plain-eager", 70, "plain", *EAGER, unless="8b-plain"),
        engine("8b-isd-eager", 70, "isd", *EAGER, unless="8b-isd"),
    ]


def second() -> list[dict[str, Any]]:
    """Equal answers of SmolLM2, then R-ISD at 8B and training."""
    fixed = ("--rows", "16,32", "--steps", "4", "--fix", "--name", "train-smoke-fix")
    return [
        engine("smol-plain-eager", 70, "plain", *SMOL_EAGER, "--floor", "4"),
        engine("smol-risd-eager", 70, "risd", *SMOL_EAGER),
        engine("smol-plain", 70, "plain", *SMOL, "--floor", "4"),
        engine("smol-risd", 70, "risd", *SMOL),
        engine("8b-risd", 100, "risd", *BIG),
        job("train-smoke", 100, "train_smoke.py", "--rows", "2,16", "--steps", "4"),
        job("train-smoke-fix", 90, "train_smoke.py", *fixed),
        engine("8b-isd-all", 100, "isd:all", *BIG),
    ]


def third() -> list[dict[str, Any]]:
    """Answers that must be the same, other acceptances, torch.compile, other coverages."""
    same = (*SMOL, "--batches", "16", "--rounds", "1")
    return [
        engine("smol-plain-invariant", 70, "plain", *same, env=INVARIANT),
        engine("smol-risd-invariant", 70, "risd", *same, env=INVARIANT, after="smol-plain-invariant"),
        engine("smol-risd-all", 70, "risd:all", *SMOL),
        engine("8b-isd-0.7", 90, "isd", *BIG, "--synthetic", "0.7"),
        engine("8b-isd-all-0.7", 90, "isd:all", *BIG, "--synthetic", "0.7"),
        engine("8b-plain-compiled", 150, "plain", *BIG, "--compile"),
        engine("8b-isd-compiled", 150, "isd", *BIG, "--compile"),
        engine("smol-risd-auto", 90, "risd:auto", *SMOL),
    ]


PLANS = {"first": first, "second": second, "third": third}


def plan(what: str, words: list[str]) -> list[dict[str, Any]]:
    """The jobs of a call; of "job", an engine by its name, its method and its arguments."""
    if what in PLANS:
        return PLANS[what]()
    if what != "job" or not words:
        raise SystemExit(f"plans.py: {what!r}; allowed are {', '.join(PLANS)}, and job NAME METHOD ENGINE_ARGS..")
    name, method, *rest = words if len(words) > 1 else (*words, "plain")
    return [engine(name, 600, method, *rest)]


if __name__ == "__main__":
    print(json.dumps(plan(sys.argv[1] if len(sys.argv) > 1 else "", sys.argv[2:]), indent=1))
