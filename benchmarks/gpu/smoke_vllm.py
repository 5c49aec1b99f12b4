"""What an engine calls of vLLM's CUDA code, against float32; how fast the device is: cases of smoke.py, GPU only."""

from __future__ import annotations

from typing import Any

import torch

TOLERANCE = 1e-2  # of a result in bfloat16, relative


def _distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


def fa3(heads: int, key_heads: int, size: int, batch: int = 4, rows: int = 7, context: int = 300) -> dict[str, Any]:
    """Paged causal attention of FlashAttention 3 as vLLM calls it."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    draw, block = torch.Generator("cpu").manual_seed(0), 16
    blocks = -(-context // block)
    cache = torch.randn(batch * blocks, key_heads, block, 2 * size, generator=draw).bfloat16().cuda()  # vLLM's layout
    query = torch.randn(batch * rows, heads, size, generator=draw).bfloat16().cuda()
    table = torch.arange(batch * blocks, dtype=torch.int32).view(batch, blocks).cuda()
    starts = torch.arange(batch + 1, dtype=torch.int32).cuda() * rows
    lengths = torch.full((batch,), context, dtype=torch.int32).cuda()
    keys, values = cache.transpose(1, 2).split(size, -1)
    plan = get_scheduler_metadata(
        batch_size=batch, max_seqlen_q=rows, max_seqlen_k=context, num_heads_q=heads, num_heads_kv=key_heads,
        headdim=size, cache_seqlens=lengths, qkv_dtype=torch.bfloat16, cu_seqlens_q=starts, page_size=block,
        causal=True,
    )  # fmt: skip
    out = torch.empty_like(query)
    flash_attn_varlen_func(
        q=query, k=keys, v=values, out=out, cu_seqlens_q=starts, max_seqlen_q=rows, seqused_k=lengths,
        max_seqlen_k=context, softmax_scale=size**-0.5, block_table=table, scheduler_metadata=plan, fa_version=3,
        causal=True,
    )  # fmt: skip
    kept = [x.float().reshape(batch, -1, key_heads, size)[:, :context] for x in (keys, values)]  # blocks lie in order
    error = _distance(out, _attention(query.float().view(batch, rows, heads, size), *kept).flatten(0, 1))
    return {"ok": error < TOLERANCE, "error": error}


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last rows of sequences: [B, rows, heads, size] over [B, context, key heads, size]."""
    rows, context = query.shape[1], key.shape[1]
    key, value = (x.repeat_interleave(query.shape[2] // key.shape[2], 2) for x in (key, value))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[3] ** -0.5
    places = torch.arange(context, device=query.device)
    seen = places[None] <= places[context - rows :, None]
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), value)


def operators() -> dict[str, Any]:
    """The norm and the activation of a Llama layer."""
    import vllm._C_stable_libtorch  # noqa: F401

    x, weight = torch.randn(28, 576, device="cuda").bfloat16(), torch.rand(576, device="cuda").bfloat16()
    normed = torch.empty_like(x)
    torch.ops._C.rms_norm(normed, x, weight, 1e-5)
    norm = _distance(normed, torch.nn.functional.rms_norm(x.float(), (576,), weight.float(), 1e-5))
    gated = torch.randn(28, 3072, device="cuda").bfloat16()
    half = torch.empty(28, 1536, device="cuda", dtype=torch.bfloat16)
    torch.ops._C.silu_and_mul(half, gated)
    gate, up = gated.float().chunk(2, -1)
    activation = _distance(half, torch.nn.functional.silu(gate) * up)
    return {"ok": max(norm, activation) < TOLERANCE, "rms_norm": norm, "silu_and_mul": activation}


def speed() -> dict[str, Any]:
    """The ceilings: how fast memory is read and written, and bfloat16 matrices are multiplied."""
    from triton.testing import do_bench

    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = do_bench(lambda: target.copy_(source), return_mode="median")
    product = do_bench(lambda: a @ b, return_mode="median")
    return {
        "ok": True,
        "device": torch.cuda.get_device_name(),
        "copy_gb_per_s": round(2 * source.nbytes / copy / 1e6),
        "matmul_tflops": round(2 * 8192**3 / product / 1e9),
    }
