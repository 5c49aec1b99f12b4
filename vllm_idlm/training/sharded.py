"""Checkpoints and whole weights of a model that is shared out over devices (FSDP2).

Each process writes and reads its own part (torch.distributed.checkpoint), so that none ever holds the whole state; the
folder has to be one that all see. Every function here is to be called by all processes together.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

_REST = "rest.pt"


def _state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    weights, moments = get_state_dict(module, optimizer, options=StateDictOptions(ignore_frozen_params=True))
    return {"weights": weights, "optimizer": moments}


def write(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, rest: dict[str, Any], main: bool) -> None:
    """The weights that are trained, the optimizer's state and `rest` into a new `folder`."""
    from torch.distributed import barrier
    from torch.distributed.checkpoint import save

    if main:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut off
        folder.mkdir()
        torch.save(rest, folder / _REST)
    barrier()
    save(_state(module, optimizer), checkpoint_id=folder)
    barrier()


def read(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put back what `write` wrote; its `rest`."""
    from torch.distributed.checkpoint import load
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    found = _state(module, optimizer)
    load(found, checkpoint_id=folder)
    set_state_dict(
        module,
        optimizer,
        model_state_dict=found["weights"],
        optim_state_dict=found["optimizer"],
        options=StateDictOptions(ignore_frozen_params=True, strict=False),
    )
    return torch.load(folder / _REST, map_location="cpu", weights_only=True)


def whole(weights: dict[str, torch.Tensor], main: bool) -> dict[str, torch.Tensor]:
    """The whole tensors of weights, on the CPU, one after another; the main process alone keeps them."""
    from torch.distributed.tensor import DTensor

    kept = {}
    for name, part in weights.items():
        tensor = part.full_tensor() if isinstance(part, DTensor) else part
        if main:
            kept[name] = tensor.detach().cpu()
    return kept
