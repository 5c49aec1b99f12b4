"""`verify_rows` in Triton: three launches, one pass over each verified row, a second one over the row emitted from.

1. `_row_stats`: per row and vocabulary block the maximum, its index and the sum of exponentials of p, and of q too;
2. `_race`: every program of a request adds up those few numbers, decides acceptance (the same in each), and runs its
   block of the race of exponentials over what is left of the one row that the request emits from;
3. `_finish`: the winner of the race; tokens in line.

No probability is ever stored: logits are read in their own dtype, everything else is a few numbers a block.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.triton_utils import tl, triton
from vllm_idlm.kernels.argmax import best, store_best
from vllm_idlm.kernels.noise import ACCEPT, RESAMPLE
from vllm_idlm.kernels.noise import triton as noise
from vllm_idlm.kernels.verify.rows import Rows, Verdict

_ACCEPT, _RESAMPLE = tl.constexpr(ACCEPT), tl.constexpr(RESAMPLE)  # a kernel reads no other globals
STATS_BLOCK = 4096
RACE_BLOCK = 8192 if noise.INTERPRETED else 1024  # noise is many instructions an element: more would spill registers


@triton.jit
def _load_anchor(rows, request, place, column, mask, temperature, HAS_PROCESSED: tl.constexpr):  # noqa: N803
    """A block of the logits of row `place` of a request, temperature and options in them; -inf for NaN."""
    (logits, logits_stride, first_row, processed, processed_stride, processed_first) = rows
    first = tl.load(first_row + request).to(tl.int64)
    scale = tl.where(temperature == 0.0, 1.0, temperature)
    if HAS_PROCESSED:
        own = tl.load(processed_first + request).to(tl.int64)
        if own >= 0:
            x = tl.load(processed + (own + place) * processed_stride + column, mask=mask, other=float("-inf"))
        else:
            raw = tl.load(logits + (first + place) * logits_stride + column, mask=mask, other=float("-inf"))
            x = raw.to(tl.float32) / scale
    else:
        raw = tl.load(logits + (first + place) * logits_stride + column, mask=mask, other=float("-inf"))
        x = raw.to(tl.float32) / scale
    return tl.where(x == x, x, float("-inf"))


@triton.jit
def _load_proposal(proposal, stride_slot, stride_place, slot, place, column, mask, temperature):
    """A block of the logits of q, divided by the temperature; -inf for NaN."""
    at = proposal + slot * stride_slot + place * stride_place + column
    x = tl.load(at, mask=mask, other=float("-inf")).to(tl.float32) / temperature
    return tl.where(x == x, x, float("-inf"))


@triton.jit
def _sum_of_exponentials(x, maximum):
    return tl.where(maximum > float("-inf"), tl.sum(tl.exp(x - tl.where(maximum > float("-inf"), maximum, 0.0))), 0.0)


@triton.jit
def _row_stats(
    p_max,
    p_sum,
    p_best,
    q_max,
    q_sum,
    blocks,
    logits,
    logits_stride,
    first_row,
    processed,
    processed_stride,
    processed_first,
    num_drafts,
    slots,
    temperatures,
    proposal,
    proposal_stride_slot,
    proposal_stride_place,
    vocabulary,
    WIDTH: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    HAS_PROPOSAL: tl.constexpr,  # noqa: N803
    HAS_PROCESSED: tl.constexpr,  # noqa: N803
):
    row, block = tl.program_id(0), tl.program_id(1)
    request, place = row // WIDTH, row % WIDTH
    drafts = tl.load(num_drafts + request)
    if place > drafts:
        return
    slot = tl.load(slots + request).to(tl.int64)
    temperature = tl.load(temperatures + slot)
    column = block * BLOCK + tl.arange(0, BLOCK)
    mask = column < vocabulary
    rows = (logits, logits_stride, first_row, processed, processed_stride, processed_first)
    x = _load_anchor(rows, request, place, column, mask, temperature, HAS_PROCESSED)
    maximum = store_best(p_max, p_best, row, blocks, block, x, BLOCK)
    out = row.to(tl.int64) * blocks + block
    if temperature != 0.0:
        tl.store(p_sum + out, _sum_of_exponentials(x, maximum))
        if HAS_PROPOSAL:  # noqa: SIM102 (this one is decided when the kernel is compiled)
            if place < drafts:
                y = _load_proposal(
                    proposal, proposal_stride_slot, proposal_stride_place, slot, place, column, mask, temperature
                )
                top = tl.max(y, axis=0)
                tl.store(q_max + out, top)
                tl.store(q_sum + out, _sum_of_exponentials(y, top))


@triton.jit
def _log_sum(maxima, sums, row, blocks, BLOCKS: tl.constexpr):  # noqa: N803
    """log of the sum of exponentials of a row, from its blocks; 0 for a row of nothing but -inf."""
    block = tl.arange(0, BLOCKS)
    mask = block < blocks
    part = tl.load(maxima + row.to(tl.int64) * blocks + block, mask=mask, other=float("-inf"))
    total = tl.load(sums + row.to(tl.int64) * blocks + block, mask=mask, other=0.0)
    maximum = tl.max(part, axis=0)
    maximum = tl.where(maximum > float("-inf"), maximum, 0.0)
    found = tl.sum(total * tl.exp(part - maximum), axis=0)
    return tl.where(found > 0.0, maximum + tl.log(tl.where(found > 0.0, found, 1.0)), 0.0)


@triton.jit
def _race(
    race_value,
    race_index,
    plain_value,
    plain_index,
    accepted_out,
    race_blocks,
    p_max,
    p_sum,
    p_best,
    q_max,
    q_sum,
    blocks,
    logits,
    logits_stride,
    first_row,
    processed,
    processed_stride,
    processed_first,
    num_drafts,
    drafts,
    positions,
    slots,
    temperatures,
    seeds,
    proposal,
    proposal_stride_slot,
    proposal_stride_place,
    vocabulary,
    WIDTH: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    BLOCKS: tl.constexpr,  # noqa: N803
    HAS_PROPOSAL: tl.constexpr,  # noqa: N803
    HAS_PROCESSED: tl.constexpr,  # noqa: N803
):
    request, block = tl.program_id(0), tl.program_id(1)
    count = tl.load(num_drafts + request)
    slot = tl.load(slots + request).to(tl.int64)
    temperature = tl.load(temperatures + slot)
    seed = tl.load(seeds + slot)
    position = tl.load(positions + request)
    rows = (logits, logits_stride, first_row, processed, processed_stride, processed_first)
    row = request * WIDTH

    accepted = tl.zeros((), tl.int32)
    going = True
    for place in range(count):
        if going:
            draft = tl.load(drafts + request * (WIDTH - 1) + place).to(tl.int64)
            if temperature == 0.0:
                _, argmax = best(p_max, p_best, row + place, blocks, BLOCKS)
                going = argmax == draft
            else:
                x = _load_anchor(rows, request, place, draft, True, temperature, HAS_PROCESSED)
                log_p = x - _log_sum(p_max, p_sum, row + place, blocks, BLOCKS)
                log_q = 0.0
                if HAS_PROPOSAL:
                    y = _load_proposal(
                        proposal, proposal_stride_slot, proposal_stride_place, slot, place, draft, True, temperature
                    )
                    log_q = y - _log_sum(q_max, q_sum, row + place, blocks, BLOCKS)
                u = noise.uniform(seed, position + place, _ACCEPT)
                going = tl.log(u) + log_q < log_p
            accepted += going.to(tl.int32)
    if block == 0:
        tl.store(accepted_out + request, accepted)
    if temperature == 0.0:
        return

    column = block * BLOCK + tl.arange(0, BLOCK)
    mask = column < vocabulary
    x = _load_anchor(rows, request, accepted, column, mask, temperature, HAS_PROCESSED)
    log_p = x - _log_sum(p_max, p_sum, row + accepted, blocks, BLOCKS)
    rest = log_p
    if accepted < count:
        draft = tl.load(drafts + request * (WIDTH - 1) + accepted)
        if HAS_PROPOSAL:
            y = _load_proposal(
                proposal, proposal_stride_slot, proposal_stride_place, slot, accepted, column, mask, temperature
            )
            left = tl.exp(log_p) - tl.exp(y - _log_sum(q_max, q_sum, row + accepted, blocks, BLOCKS))
            rest = tl.where(left > 0.0, tl.log(tl.where(left > 0.0, left, 1.0)), float("-inf"))
        rest = tl.where(column == draft, float("-inf"), rest)
    runner = noise.log_exponential(seed, column, position + accepted, _RESAMPLE)
    rest, plain = tl.where(mask, rest - runner, float("-inf")), tl.where(mask, log_p - runner, float("-inf"))
    store_best(race_value, race_index, request, race_blocks, block, rest, BLOCK)
    store_best(plain_value, plain_index, request, race_blocks, block, plain, BLOCK)


@triton.jit
def _finish(
    tokens,
    emitted,
    accepted_in,
    race_value,
    race_index,
    plain_value,
    plain_index,
    race_blocks,
    p_max,
    p_best,
    blocks,
    drafts,
    slots,
    temperatures,
    WIDTH: tl.constexpr,  # noqa: N803
    PADDED: tl.constexpr,  # noqa: N803
    BLOCKS: tl.constexpr,  # noqa: N803
    RACE_BLOCKS: tl.constexpr,  # noqa: N803
):
    request = tl.program_id(0)
    accepted = tl.load(accepted_in + request)
    slot = tl.load(slots + request).to(tl.int64)
    if tl.load(temperatures + slot) == 0.0:
        _, token = best(p_max, p_best, request * WIDTH + accepted, blocks, BLOCKS)
    else:
        value, token = best(race_value, race_index, request, race_blocks, RACE_BLOCKS)
        if value == float("-inf"):  # p and q are equal up to rounding: nothing is left, and p is as good
            _, token = best(plain_value, plain_index, request, race_blocks, RACE_BLOCKS)
    place = tl.arange(0, PADDED)
    own = tl.load(drafts + request * (WIDTH - 1) + place, mask=place < WIDTH - 1, other=-1)
    line = tl.where(place < accepted, own, tl.where(place == accepted, token.to(tl.int64), -1))
    tl.store(tokens + request * WIDTH + place, line, mask=place < WIDTH)
    tl.store(emitted + request, accepted + 1)


def verify_rows(rows: Rows) -> Verdict:
    """As `rows.verify_rows`, without a wait for the device. `drafts` must be contiguous."""
    batch, most = rows.drafts.shape
    width, vocabulary = most + 1, rows.logits.shape[-1]
    blocks, race_blocks = triton.cdiv(vocabulary, STATS_BLOCK), triton.cdiv(vocabulary, RACE_BLOCK)
    device = rows.logits.device
    # Each a tensor of its own: a part of a larger one may begin at any multiple of 4 bytes, by batch size, and Triton
    # compiles a kernel anew for a pointer that is not a multiple of 16.
    p_max, p_sum, q_max, q_sum = (_numbers(device, batch * width, blocks) for _ in range(4))
    p_best = _indices(device, batch * width, blocks)
    race_value, plain_value = (_numbers(device, batch, race_blocks) for _ in range(2))
    race_index, plain_index = (_indices(device, batch, race_blocks) for _ in range(2))
    accepted, emitted = (_indices(device, batch) for _ in range(2))
    tokens = torch.empty(batch, width, dtype=torch.int64, device=device)
    if batch == 0:
        return Verdict(tokens, emitted)
    anchors, proposal = _pointers(rows)
    flags = {"HAS_PROPOSAL": rows.proposal is not None, "HAS_PROCESSED": rows.processed is not None}
    padded = triton.next_power_of_2(blocks)
    stats = (p_max, p_sum, p_best, q_max, q_sum, blocks)
    _row_stats[(batch * width, blocks)](
        *stats, *anchors, rows.num_drafts, rows.slot, rows.temperature, *proposal, vocabulary,
        WIDTH=width, BLOCK=STATS_BLOCK, **flags,
    )  # fmt: skip
    race = (race_value, race_index, plain_value, plain_index)
    _race[(batch, race_blocks)](
        *race, accepted, race_blocks, *stats, *anchors, rows.num_drafts, rows.drafts, rows.position, rows.slot,
        rows.temperature, rows.seed, *proposal, vocabulary,
        WIDTH=width, BLOCK=RACE_BLOCK, BLOCKS=padded, **flags,
    )  # fmt: skip
    _finish[(batch,)](
        tokens, emitted, accepted, *race, race_blocks, p_max, p_best, blocks, rows.drafts, rows.slot, rows.temperature,
        WIDTH=width, PADDED=triton.next_power_of_2(width), BLOCKS=padded,
        RACE_BLOCKS=triton.next_power_of_2(race_blocks), num_warps=1,
    )  # fmt: skip
    return Verdict(tokens, emitted)


def _numbers(device: torch.device, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=device)


def _indices(device: torch.device, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device=device)


def _pointers(rows: Rows) -> tuple[tuple, tuple]:
    """The anchors' and the proposals' tensors as kernels take them, with strides; stand-ins where there are none."""
    made = rows.processed if rows.processed is not None else rows.logits
    first = rows.processed_first if rows.processed is not None else rows.first_row
    anchors = (rows.logits, rows.logits.stride(0), rows.first_row, made, made.stride(0), first)
    q = rows.proposal
    return anchors, (rows.logits, 0, 0) if q is None else (q, q.stride(0), q.stride(1))
