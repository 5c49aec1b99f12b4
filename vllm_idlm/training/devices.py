"""The devices of a run, as accelerate's configuration names them.

One; several with the whole model each (data parallel); several that share weights, gradients and optimizer out (FSDP2).
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch

from vllm_idlm.training.config import Config, ConfigError


def accelerator(config: Config) -> Any:
    """accelerate's Accelerator for a run; ConfigError for a way to share a model out that training cannot go."""
    from accelerate import Accelerator

    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":  # before it takes hold of anything
        refuse("DEEPSPEED")
    _check_trackers(config)
    mixed = "bf16" if config.dtype == "bfloat16" else "no"
    plugin = _plugin(config) if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" else None
    made = Accelerator(
        cpu=int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available(),  # else each runs alone
        mixed_precision=mixed,
        log_with=config.trackers or None,
        project_dir=config.out,
        fsdp_plugin=plugin,
    )
    if plugin is not None and made.distributed_type.value == "MULTI_CPU":
        _shard_on_cpu(made, plugin)
    refuse(made.distributed_type.value)
    return made


def _check_trackers(config: Config) -> None:
    """ConfigError for a tracker whose package is missing: accelerate would leave it out and say nothing."""
    from accelerate.tracking import get_available_trackers

    packages = {"tensorboard": "tensorboardX (or tensorboard)", "wandb": "wandb"}
    there = {str(name) for name in get_available_trackers()}
    for name in config.trackers:
        if name not in there:
            raise ConfigError(f"trackers: {name} is not installed. Fix: pip install {packages[name]}, or leave it out")


def _plugin(config: Config) -> Any:
    """accelerate's FSDP settings, from the environment that `accelerate launch` makes of its configuration."""
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise ConfigError(
            f"accelerate's fsdp_version is {plugin.fsdp_version}; allowed is 2. Fix: fsdp_version: 2 under "
            "fsdp_config, as in configs/train/accelerate/fsdp.yaml"
        )
    if plugin.cpu_ram_efficient_loading:
        raise ConfigError(
            "accelerate's fsdp_cpu_ram_efficient_loading is true; allowed is false: a run changes the model that it "
            "loaded before it is shared out. Fix: fsdp_cpu_ram_efficient_loading: false under fsdp_config"
        )
    # The full form holds float32 weights: they travel and work in config.dtype, gradients are summed in float32, and
    # the loss stays float32 (accelerate's own policy would round all three). A gated base is in that dtype anyway.
    full = config.form == "full" and config.dtype == "bfloat16"
    half = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if full else {}
    plugin.mixed_precision_policy = MixedPrecisionPolicy(**half)
    return plugin


def _shard_on_cpu(made: Any, plugin: Any) -> None:
    """FSDP2 over processes on CPUs: torch does it (gloo), accelerate turns to it on accelerators only."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    made.state.fsdp_plugin = plugin
    made.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def refuse(kind: str) -> None:
    """ConfigError for a kind of accelerate's that the training loop was not written for."""
    if kind not in ("NO", "FSDP") and not kind.startswith("MULTI_"):
        raise ConfigError(
            f"accelerate is set up for {kind}; allowed are one device, data parallelism (MULTI_GPU, MULTI_CPU) and "
            "FSDP with fsdp_version 2, which shares out what ZeRO stage 3 does (stage 2 with "
            "fsdp_reshard_after_forward: false). Fix: --config_file configs/train/accelerate/fsdp.yaml"
        )


def synchronised(made: Any, module: Any, last: bool) -> Any:
    """Gradients are exchanged between devices in a step's last backward only."""
    return contextlib.nullcontext() if last else made.no_sync(module)
