"""What a forward of so many rows takes here: the model and its head run on made-up tokens, without attention."""

from __future__ import annotations

import logging
import time
from typing import Any, NamedTuple

import numpy as np
import torch

from vllm_idlm.engine_args import DRAFT_LORA_ID

log = logging.getLogger("vllm.idlm")
_ROWS = (1, 2, 4, 7, 10, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_PASSES, _SECONDS = 6, 2.5  # at most; the first pass, over all sizes, has half of the time


class Measured(NamedTuple):
    """Seconds of a forward by its rows, as `Cost` takes them; plain lists, for other processes."""

    rows: list[int]
    plain: list[float]
    masked: list[float]


@torch.inference_mode()
def measure(isd: Any) -> Measured:
    """Forwards with and without mask slots (which take the draft adapter, if there is one).

    isd: the proposer or speculator. The first pass stops at the rows of a full batch or when its time is over, and
    others follow over the same sizes, the small ones first: a moment in which the machine was busy with something else
    is seen through by the best of several moments. Several ranks look at no clock, for each must run the same forwards:
    one pass over all sizes.
    """
    runner, draft_lora = isd.runner, isd.draft_lora
    config = runner.vllm_config
    most = runner.max_num_reqs * (1 + config.speculative_config.num_speculative_tokens)
    rows = [count for count in _ROWS if count <= min(most, runner.max_num_tokens)]
    began, alone = time.perf_counter(), config.parallel_config.world_size == 1
    best: dict[tuple[int, bool], float] = {}
    for again in range(_PASSES if alone else 1):
        for count in rows:
            if alone and len(best) > 6 and time.perf_counter() - began > (_SECONDS if again else _SECONDS / 2):
                rows = rows if again else rows[: rows.index(count)]
                break
            for masked in (False, True) if draft_lora is not None else (False,):
                took = _seconds(isd, count, draft_lora if masked else None, 1 if again else 2 if alone else 3)
                best[count, masked] = min(best.get((count, masked), took), took)
    measured = _tables(best)
    found = ", ".join(f"{r}: {p * 1e3:.1f}/{m * 1e3:.1f}" for r, p, m in zip(*measured, strict=True))
    log.info("ISD: ms of a forward by rows, without/with mask slots: %s", found)
    return measured


def _tables(best: dict[tuple[int, bool], float]) -> Measured:
    """Seconds by rows and whether there are mask slots, as tables.

    More rows never take less, and mask slots never less than none (their adapter comes on top): so what a busy machine
    added to one figure is taken off by another.
    """
    rows = sorted({count for count, _ in best})
    masked = _rising([best.get((count, True), best[count, False]) for count in rows])
    plain = _rising([best[count, False] for count in rows])
    return Measured(rows, np.minimum(plain, masked).tolist(), masked)


def _rising(seconds: list[float]) -> list[float]:
    return np.minimum.accumulate(seconds[::-1])[::-1].tolist()


def _seconds(isd: Any, rows: int, lora: Any, forwards: int) -> float:
    """Of the fastest of so many forwards; of several, the first does not count."""
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
    for _ in range(forwards):
        began = time.perf_counter()
        with set_forward_context(None, runner.vllm_config, num_tokens=rows):
            hidden = runner.model(input_ids=ids, positions=places, intermediate_tensors=None, inputs_embeds=None)
            runner.model.compute_logits(hidden)
        if runner.device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:] or times)
