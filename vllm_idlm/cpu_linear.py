"""Whose products of the model's weights an engine on CPUs runs: vLLM's (oneDNN), or ours (`kernels.linear`).

A verify forward has a few rows more than a plain one, which costs little only where a product of a few rows is bound by
reading the weights. oneDNN is that on processors with instructions for bfloat16; without them a few rows take it
three times as long as one, or more. Ours is bound by memory there.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

from vllm_idlm.kernels import linear
from vllm_idlm.kernels.native import BuildError
from vllm_idlm.settings import ISDSettings, SettingsError

log = logging.getLogger("vllm.idlm")


def slow_at_bfloat16() -> bool:
    """Whether this processor is one that ours was made for: AVX-512 without instructions for bfloat16."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def resolve(settings: ISDSettings, dtype: torch.dtype) -> ISDSettings:
    """`settings` with `cpu_linear` "rows" or "vllm". dtype: of the model.

    Raises SettingsError where "rows" was asked for and cannot be had.
    """
    from vllm.platforms import current_platform

    if settings.cpu_linear == "vllm":
        return settings
    asked = settings.cpu_linear == "rows"
    if not current_platform.is_cpu() or dtype not in linear.DTYPES:
        if asked:
            raise SettingsError(
                f'"cpu_linear": "rows" is for models in bfloat16 or float32 on CPUs; this one is {dtype} on '
                f'{current_platform.device_name}. Leave it out, or set "vllm"'
            )
        return settings.model_copy(update={"cpu_linear": "vllm"})
    ours = asked or (dtype == torch.bfloat16 and slow_at_bfloat16())
    if ours:
        try:
            linear.load()
        except BuildError as error:
            if asked:
                raise SettingsError(f'"cpu_linear": "rows": {error}') from None
            log.warning("products of the weights are vLLM's, two to four times slower for a few rows: %s", error)
            ours = False
    return settings.model_copy(update={"cpu_linear": "rows" if ours else "vllm"})


def take(layer: Any) -> bool:
    """Give a layer of vLLM our product, if it takes the layer's weight, which stays as it is; else say so, once.

    A worker on a machine without a compiler keeps vLLM's, which other ranks need not know of.
    """
    weight = layer.weight
    if not linear.fits(weight):
        _keeps(f"{weight.dtype} weights, or of a width that is no multiple of 64 bytes, such as {tuple(weight.shape)}")
        return False
    try:
        linear.load()
    except BuildError as error:
        _keeps(f"on this machine: {error}")
        return False
    layer.cpu_linear = linear.linear
    return True


@functools.cache
def _keeps(what: str) -> None:
    log.warning("products of the weights stay vLLM's, slower for a few rows: %s", what)
