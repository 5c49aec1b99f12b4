"""The project's kernels against their oracles, which are plain torch: cases of smoke.py.

Inputs are those of the tests, moved to the device. What a GPU runs inside a CUDA graph is captured once and replayed
with other contents of the same tensors, as vLLM does; a CPU calls it again instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jobs  # noqa: F401 (makes `tests` importable)

# isort: split
import torch
import vllm.triton_utils  # noqa: F401 (before the kernels: it decides whether there is Triton)

from tests.interpreted import test_draft as drafting
from tests.interpreted import test_verify as verifying
from tests.unit.kernels import test_lora, test_tail

SHARE = 0.98  # of sampled rows that must be the oracle's
TOLERANCE = 1e-2  # of a result in half precision, relative
_device = torch.device("cpu")


def use(device: str) -> None:
    """The device of all cases."""
    global _device
    _device = torch.device(device)


def on(values: Any) -> Any:
    """A named tuple with its tensors on the device."""
    return type(values)(*(v.to(_device) if isinstance(v, torch.Tensor) else v for v in values))


def captured(run: Callable[[], None]) -> Callable[[], None]:
    """What runs `run` again: a CUDA graph's replay, or on a CPU `run` itself."""
    run()  # compiles; inside a capture nothing may compile
    if _device.type != "cuda":
        return run
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """How far off, relative to the size of what is wanted."""
    return float((found.cpu().float() - wanted.cpu().float()).norm() / wanted.float().norm())


def verify(batch: int, most: int, vocabulary: int, kind: str) -> dict[str, Any]:
    """Verification of three batches."""
    from vllm_idlm.kernels.verify import rows as oracle
    from vllm_idlm.kernels.verify.triton import verify_rows

    greedy = {"greedy": lambda b: True, "mixed": lambda b: b % 2 == 0}.get(kind)
    same = total = 0
    for seed in range(3):
        options = {"one_hot": kind == "one-hot", "processed": kind in ("processed", "mixed"), "greedy": greedy}
        rows = on(verifying.make(batch, most, vocabulary, torch.bfloat16, seed, **options))
        wanted, ours = oracle.verify_rows(rows), verify_rows(rows)
        same += int((ours.tokens == wanted.tokens).all(1).sum())
        total += batch
    return {"ok": same >= (total if kind == "greedy" else SHARE * total), "same": same, "of": total}


def draft(batch: int, most: int, vocabulary: int, kind: str) -> dict[str, Any]:
    """Drafts, and the logits of q that are kept for the next forward."""
    from vllm_idlm.kernels.draft import rows as oracle
    from vllm_idlm.kernels.draft.triton import draft_rows

    greedy = (lambda b: b % 2 == 0) if kind == "mixed" else lambda b: False
    rows = on(drafting.mask_rows(batch, most, vocabulary, torch.bfloat16, greedy))
    results = []
    for run in (oracle.draft_rows, draft_rows):
        drafts = torch.empty(batch, most, dtype=torch.int64, device=_device)
        shape = (drafting.SLOTS, most, vocabulary)
        kept = None if kind == "argmax" else torch.zeros(shape, dtype=torch.bfloat16, device=_device)
        run(rows, drafts, kept)
        results.append((drafts, kept))
    (wanted, wanted_q), (ours, our_q) = results
    same, kept = int((wanted == ours).sum()), kind == "argmax" or torch.equal(wanted_q, our_q)
    return {"ok": kept and same >= SHARE * ours.numel(), "same": same, "of": ours.numel(), "q_kept": kept}


def gate() -> dict[str, Any]:
    """The test of the gate, with the kernel on the device."""
    from vllm_idlm.kernels.gate import triton as kernel

    original = kernel.gate

    def moved(given: Any, own: torch.Tensor, draft_adapter: int, out: Any) -> None:
        there = on(out)
        original(on(given), own.to(_device), draft_adapter, there)
        for a, b in zip(out, there, strict=True):
            a.copy_(b)

    kernel.gate = moved
    try:
        for seed in range(4):
            drafting.test_the_gate_equals_the_oracle(seed)
    finally:
        kernel.gate = original
    return {"ok": True}


def tail(contexts: list[int], heads: int, key_heads: int, size: int) -> dict[str, Any]:
    """Attention of extra groups of masks."""
    from vllm_idlm.kernels.tail import naive
    from vllm_idlm.kernels.tail.triton import tail_attention

    shape = {"heads": heads, "key_heads": key_heads, "size": size, "dtype": torch.bfloat16}
    query, key, value, rows = test_tail.make(contexts, 3, 4, **shape)
    ours, wanted = torch.full_like(query, 7.0, device=_device).contiguous(), torch.full_like(query, 7.0).float()
    moved = [x.to(_device) for x in (query.contiguous(), key, value)]
    tail_attention(ours, *moved, on(rows), size**-0.5)
    naive.tail_attention(wanted, query.float(), key.float(), value.float(), rows, size**-0.5)
    written = (wanted != 7.0).all(-1)
    error = distance(ours.cpu()[written], wanted[written])
    alone = bool((ours.cpu()[~written] == 7.0).all())
    return {"ok": alone and error < TOLERANCE, "error": error, "others left alone": alone}


def tail_in_a_graph() -> dict[str, Any]:
    """The rows that `DevicePlan` lays out, read by a graph captured without any: steps of one to four requests.

    Full rows, narrow ones (without extra groups), a prompt, none: what is not there must be left alone.
    """
    from vllm_idlm.kernels.tail import naive
    from vllm_idlm.kernels.tail.triton import tail_attention

    from tests.unit import test_tail as host
    from vllm_idlm.tail import DevicePlan, plan, views

    draw = torch.Generator().manual_seed(0)
    cache = views(torch.randn(host.ROOM * 8, 2, 32, 2 * 32, generator=draw))
    query = torch.randn(host.ROOM * host.WIDTH, 4, 32, generator=draw)
    ours, table = torch.empty_like(query, device=_device), host.table().to(_device)
    moved, there = query.to(_device), [x.to(_device) for x in cache]
    device_plan = DevicePlan(host.MASKS, host.GROUPS, host.ROOM, _device)
    places = device_plan.empty(table)
    replay = captured(lambda: tail_attention(ours, moved, *there, places, 0.25))
    worst, alone = 0.0, True
    for rows in ([host.WIDTH], [host.WIDTH] * 4, [host.WIDTH, 7, host.WIDTH], [0, host.WIDTH], [3, 1], []):
        starts = torch.tensor([0, *rows]).cumsum(0)
        computed = torch.tensor([30 + 9 * i for i in range(len(rows))], dtype=torch.int64)
        given = (starts.int(), torch.tensor(rows, dtype=torch.int32), computed, torch.zeros(len(query)).long())
        device_plan.begin(*(x.to(_device) for x in given))
        device_plan.tail(table)
        ours.fill_(7.0)
        replay()
        device_plan.end()
        wanted = torch.full_like(query, 7.0)
        kinds = [host.FULL if count == host.WIDTH else host.Row() for count in rows]
        if host.FULL in kinds:
            laid = plan(kinds, starts[:-1].numpy(), computed.numpy())
            naive.tail_attention(wanted, query, *cache, laid.tail(host.table()), 0.25)
        written = (wanted != 7.0).all(-1)
        if written.any():
            worst = max(worst, distance(ours.cpu()[written], wanted[written]))
        alone &= bool((ours.cpu()[~written] == 7.0).all())
    return {"ok": alone and worst < 1e-4, "error": worst, "others left alone": alone}


def lora_in_a_graph(shape: str, dtype: torch.dtype) -> dict[str, Any]:
    """vLLM's LoRA kernels with our metadata: captured with every row mapped, replayed with rows as a gate maps them.

    Two requests of 7 rows, the draft adapter in slot 1, the second request's own adapter in slot 0.
    """
    from vllm.lora.ops.triton_ops import lora_expand, lora_shrink
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
    from vllm_idlm.kernels.lora import naive

    from vllm_idlm.v2.lora import fill_kernel_meta

    y, x, _, a, b, widths = test_lora.make(shape, 14, dtype, slots=2)
    meta, mapping = LoRAKernelMeta.make(2, 64, _device), torch.ones(14, dtype=torch.int64, device=_device)
    rank, into, moved = a[0].shape[2], y.to(_device, copy=True), x.to(_device)
    down, up = ([w.to(_device) for w in ws] for ws in (a, b))

    def linear() -> None:  # as PunicaWrapperGPU.add_lora_linear
        buffer = torch.empty(len(widths), 14, rank, dtype=torch.float32, device=_device)
        rows = meta.meta_args(14, False)
        lora_shrink(moved, down, buffer, *rows, 1.0)
        lora_expand(buffer, up, into, *rows, offset_start=0, add_inputs=True)

    fill_kernel_meta(meta, mapping)
    replay = captured(linear)
    worst, untouched = 0.0, True
    for own, drafts in (([-1, 0], [3, 0]), ([-1, -1], [1, 3]), ([0, -1], [0, 2])):
        _mapped(mapping, own, drafts)
        fill_kernel_meta(meta, mapping)
        into.copy_(y)
        replay()
        slots, wanted = mapping.cpu(), y.clone()
        naive.add_lora_rows(wanted, x, slots, a, b, widths)
        with_adapter = slots >= 0
        worst = max(worst, distance(into.cpu()[with_adapter], wanted[with_adapter]))
        untouched &= torch.equal(into.cpu()[~with_adapter], y[~with_adapter])
    return {"ok": untouched and worst < TOLERANCE, "error": worst, "other rows bit for bit": untouched}


def _mapped(mapping: torch.Tensor, own: list[int], drafts: list[int]) -> None:
    """Fill `mapping` ([14] slots) as the gate does in a decode step of two requests with so many drafts."""
    from vllm_idlm.kernels.gate import Batch, Gate
    from vllm_idlm.kernels.gate.triton import gate

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=_device)

    rows, slot = ints(0, 7, 14), torch.arange(2, device=_device)
    batch = Batch(rows, rows, ints(70, 90), ints(50, 50), slot, ints(*drafts))
    out = Gate(ints(0, 0), ints(0, 0), mapping, torch.empty_like(mapping))
    gate(batch, torch.tensor(own, device=_device), 1, out)
