"""What training lacks on a GPU, put in from outside until the project has it (see README.md).

1. Block masks are compiled: else the predicate is evaluated over [rows, masks, clean + masks] in int64, twice a step.
2. Evaluation pads its samples to one shape: else FlexAttention is compiled anew for each held-out sample.
3. Chunks of logits of 1 GiB instead of 64 MiB.
4. A thread lays out the next batches while the GPU works.
5. Masks are padded to the most that a row can have, so that there is one shape.

GPUKIT_COMPILED_MASKS=0 leaves the first out; GPUKIT_CHUNK gives the third in bytes.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator
from typing import Any

from vllm_idlm.training import acceptance, forward, losses, stream
from vllm_idlm.training.config import Config
from vllm_idlm.training.layout import Batch, visible

BLOCK = 128  # clean places are padded to a multiple of it
MASKS = 512  # and masks to one of this


def apply(config: Config) -> None:
    """Put all of them in, for a run of this configuration."""
    masks_and_chunks()
    forward.padded = one_shape(config)
    acceptance._of_sample = evaluation_of_one_shape(config)
    stream.Stream.steps = ahead


def masks_and_chunks() -> None:
    """Put in the first and the third alone."""
    losses.CHUNK_BYTES = acceptance.CHUNK_BYTES = int(os.environ.get("GPUKIT_CHUNK", 1 << 30))
    forward.block_mask = block_mask


def block_mask(batch: Batch, clean: bool, masks: bool) -> Any:
    """As `forward.block_mask`, compiled."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, length = batch.tokens.shape
    extra = batch.start.shape[1] if masks else 0
    seen, queries = visible(batch, clean, masks), (length if clean else 0) + extra
    compiled = os.environ.get("GPUKIT_COMPILED_MASKS", "1") == "1"
    options = {"device": batch.tokens.device, "_compile": compiled}
    return create_block_mask(lambda b, _, q, k: seen(b, q, k), rows, None, queries, length + extra, **options)


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def one_shape(config: Config) -> Any:
    """`forward.padded` to the most masks that a row of this configuration can have."""
    most = _up(config.row_tokens * min(config.tilings, config.stride - 1), MASKS)

    def padded(batch: Batch, length: int) -> Batch:
        if batch.tokens.device.type != "cuda":
            return batch
        return batch.widened(_up(length, BLOCK), max(most, _up(batch.start.shape[1], MASKS)))

    return padded


def evaluation_of_one_shape(config: Config) -> Any:
    """`acceptance._of_sample` of samples padded alike."""
    original = acceptance._of_sample
    length, slots = _up(config.row_tokens, BLOCK), _up(config.row_tokens * (config.stride - 1), MASKS)

    def of_sample(model: Any, sample: Any, batch: Batch, *rest: Any) -> Any:
        fits = batch.tokens.shape[1] <= length and batch.start.shape[1] <= slots
        if batch.tokens.device.type == "cuda" and fits:
            batch = batch.widened(length, slots)
        return original(model, sample, batch, *rest)

    return of_sample


_steps = stream.Stream.steps


def ahead(self: stream.Stream, first: int) -> Iterator[list[Batch]]:
    """As `Stream.steps`, up to eight steps ahead in a thread."""
    made: queue.Queue = queue.Queue(maxsize=8)

    def work() -> None:
        try:
            for batches in _steps(self, first):
                made.put(batches)
            made.put(None)
        except BaseException as error:  # it is the reader's
            made.put(error)

    threading.Thread(target=work, daemon=True).start()
    while (found := made.get()) is not None:
        if isinstance(found, BaseException):
            raise found
        yield found
