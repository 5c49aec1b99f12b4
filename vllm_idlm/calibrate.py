"""What a forward of so many rows takes here: the model and its head run on made-up tokens, without attention."""

from __future__ import annotations

import logging
import time
from typing import Any, NamedTuple

import numpy as np
import torch

from vllm_idlm.engine_args import DRAFT_LORA_ID

log = logging.getLogger("vllm.idlm")
_ROWS = (1, 2, 4, 7, 10, 13, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_PASSES, _SECONDS = 3, 2.0


class Measured(NamedTuple):
    """Seconds of a forward by its rows, as `Cost` takes them; plain lists, for other processes."""

    rows: list[int]
    plain: list[float]
    masked: list[float]


@torch.inference_mode()
def measure(isd: Any) -> Measured:
    """Forwards with and without mask slots (which take the draft adapter, if there is one).

    isd: the proposer or speculator. Stops at the rows of a full batch, or after two seconds; `Cost` goes on from there.
    Several ranks look at no clock, for each must run the same forwards: one pass over all sizes.
    """
    runner, draft_lora = isd.runner, isd.draft_lora
    config = runner.vllm_config
    most = runner.max_num_reqs * (1 + config.speculative_config.num_speculative_tokens)
    rows = [count for count in _ROWS if count <= min(most, runner.max_num_tokens)]
    plain, masked = {}, {}
    began, alone = time.perf_counter(), config.parallel_config.world_size == 1
    for _ in range(_PASSES if alone else 1):
        for count in rows:
            if alone and len(plain) > 3 and time.perf_counter() - began > _SECONDS:
                break
            plain[count] = min(plain.get(count, 1e9), _seconds(isd, count, None))
            if draft_lora is not None:
                masked[count] = min(masked.get(count, 1e9), _seconds(isd, count, draft_lora))
    measured = Measured(list(plain), _rising(plain), _rising(masked or plain))
    found = ", ".join(f"{r}: {p * 1e3:.1f}/{m * 1e3:.1f}" for r, p, m in zip(*measured, strict=True))
    log.info("ISD: ms of a forward by rows, without/with mask slots: %s", found)
    return measured


def _rising(seconds: dict[int, float]) -> list[float]:
    """By rows; more rows never take less, so what a busy machine added to a few is taken off by the next."""
    return np.minimum.accumulate(list(seconds.values())[::-1])[::-1].tolist()


def _seconds(isd: Any, rows: int, lora: Any) -> float:
    """The better of two forwards after one that does not count."""
    from vllm.forward_context import set_forward_context

    runner = isd.runner
    if getattr(isd, "base_graph", None) is not None:  # Model Runner V1
        isd.base_graph.use(lora is None)
    ids = torch.zeros(rows, dtype=torch.int32, device=runner.device)
    places = torch.arange(rows, device=runner.device)
    if runner.lora_config is not None:
        own = tuple([0] + [DRAFT_LORA_ID if lora is not None else 0] * (rows - 1))
        runner._set_active_loras(own, own, {lora} - {None})
    times = []
    for _ in range(3):
        began = time.perf_counter()
        with set_forward_context(None, runner.vllm_config, num_tokens=rows):
            hidden = runner.model(input_ids=ids, positions=places, intermediate_tensors=None, inputs_embeds=None)
            runner.model.compute_logits(hidden)
        if runner.device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])
