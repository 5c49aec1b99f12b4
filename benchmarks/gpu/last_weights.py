"""The trained weights of a run's last checkpoint as safetensors: what is left of a run that did not come to its end.

last_weights.py RUN_DIR OUT.safetensors
"""

from __future__ import annotations

import sys
from pathlib import Path


def write(run: Path, target: Path) -> None:
    """Write the weights in bfloat16, named as in training; FileNotFoundError where there is no checkpoint."""
    import torch
    from safetensors.torch import save_file

    found = sorted(run.glob("state-*"))
    if not found:
        raise FileNotFoundError(f"{run} holds no checkpoint")
    state = torch.load(found[-1], map_location="cpu", weights_only=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: w.bfloat16().contiguous() for name, w in state["weights"].items()}, str(target))


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
