"""Checkpoints of a run, whole or not there, and whether a run may go on from one.

A checkpoint is one file; of a model shared out over devices (`sharded`) it is a folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_idlm.training.config import Config, ConfigError
from vllm_idlm.training.layout import Sample

RUN = "run.json"  # what a checkpoint of the folder belongs to
_FREE = {"stop_minutes", "save_every", "eval_every", "trackers", "out", "data", "eval_data"}  # may change on the way


def files(out: Path) -> list[Path]:
    """The checkpoints in a run's folder, oldest first."""
    return sorted(out.glob("state-*"))


def identity(config: Config, base_fingerprint: str, train: Sequence[Sample], world: int | str) -> dict[str, Any]:
    """What has to stay the same for a resumed run to be the uninterrupted one: settings, base, samples, devices."""
    digest = hashlib.sha256()
    for sample in train:
        digest.update(repr((list(sample.prompt), list(sample.answer))).encode())
    settings = {name: value for name, value in config.model_dump(mode="json").items() if name not in _FREE}
    return {**settings, "base": base_fingerprint, "samples": digest.hexdigest()[:16], "devices": world}


def check(out: Path, now: dict[str, Any]) -> None:
    """ConfigError, naming field and both values, if the checkpoints in `out` belong to another run."""
    before = json.loads((out / RUN).read_text(encoding="utf-8"))
    for name, value in now.items():
        if before.get(name) != value:
            raise ConfigError(
                f"{name}: {value!r}, but the checkpoint in {out} was made with {before.get(name)!r}. Fix: the old "
                "value to go on with that run, or another `out` for a new one"
            )


def save(out: Path, step: int, state: dict[str, Any], belongs_to: dict[str, Any]) -> Path:
    """Write `state` as the checkpoint of `step`; earlier ones go."""
    scratch = scratch_of(out, step, ".pt")
    torch.save(state, scratch)
    return take(scratch, belongs_to)


def scratch_of(out: Path, step: int, suffix: str = "") -> Path:
    """Where the checkpoint of `step` is written before it is whole."""
    return out / f".state-{step:07d}{suffix}"


def take(scratch: Path, belongs_to: dict[str, Any]) -> Path:
    """A whole checkpoint to its place; earlier ones go."""
    target = scratch.with_name(scratch.name.removeprefix("."))
    (scratch.parent / RUN).write_text(json.dumps(belongs_to, indent=1), encoding="utf-8")
    if target.is_dir():
        shutil.rmtree(target)
    scratch.rename(target)
    for old in files(target.parent):
        if old != target:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    return target


def learnt(model: Any) -> dict[str, torch.Tensor]:
    """The weights that a run changes, by name (tied ones once)."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def put_back(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Set the weights of `learnt`; ConfigError if they are those of another model."""
    own = learnt(model)
    if own.keys() != weights.keys():
        odd = sorted(own.keys() ^ weights.keys())
        raise ConfigError(f"the checkpoint is of another model: {len(odd)} weights differ, first {odd[0]}")
    for name, p in own.items():
        p.copy_(weights[name])
