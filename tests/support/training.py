"""Train on the songs of a world (`songs.write_world`): in this process, or with `idlm train` in several."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support import songs
from tests.support.paths import ROOT
from vllm_idlm.training import config, loop, start

ACCELERATE = ROOT / "configs" / "train" / "accelerate"


def _given(world: Path) -> dict[str, Any]:
    return {
        "model": str(world / "base"), "mask_token_id": songs.MASK,
        "data": [str(world / "train.jsonl")], "eval_data": [str(world / "eval.jsonl")],
        "max_tokens": 128, "row_tokens": 140, "tilings": 3, "dtype": "float32",
    }  # fmt: skip


def settings(world: Path, out: Path, **other: Any) -> config.Config:
    """A run that learns to draft in a minute."""
    own = {"out": str(out), "rows": 8, "steps": 120, "lr": 4e-3, "eval_every": 60, "save_every": 1000}
    return config.Config(**{**_given(world), **own, **other})


def several(world: Path, form: str, **other: Any) -> config.Config:
    """A short run for several processes, in one of the two forms."""
    own = {
        "out": "unset", "form": form, "rows": 2, "accumulate": 2, "steps": 8, "lr": 2e-3,
        "loss": {"ce": 1.0} if form == "full" else {"tv": 1.0, "kl": 1.0},
        "stages": [{"stride": 2, "until": 0.5}, {"stride": 4, "until": 1}],
    }  # fmt: skip
    return config.Config(**{**_given(world), **own, **other})


def run(made: config.Config, events: list | None = None) -> loop.Run:
    """The run of a configuration, ready to train; what it reports is added to `events`."""
    base = start.base(made)
    note = (lambda event, values: events.append((event, values))) if events is not None else (lambda *_: None)
    return start.run(made, base, *start.samples(made, None), note)


def launch(by: str, file: Path, *overrides: str, processes: int = 2) -> subprocess.CompletedProcess:
    """`idlm train` in several processes, as the documents say."""
    words = ["accelerate.commands.launch", "--config_file", str(ACCELERATE / by), "--num_processes", str(processes)]
    command = [sys.executable, "-m", *words, "-m", "vllm_idlm.cli", "train", str(file), *overrides]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=900)


def loss_of_steps(folder: Path) -> list[float]:
    """The loss of each step of the run in `folder`."""
    lines = map(json.loads, (folder / loop.METRICS).read_text().splitlines())
    return [line["loss"] for line in lines if line["event"] == "step"]
