"""The forwards of training, through transformers' own modules: Llama, Qwen2, Qwen3, Mistral families.

Gated form: `clean` runs the packed rows through the base model without gradient and keeps each layer's keys and values;
`masks` runs the mask rows alone, with the adapter, over these and their own. A step then costs one forward of the clean
rows and forward and backward of the mask rows only, and the base's distribution at every place comes with it.
Full form: `both` runs clean and mask rows in one forward, as the paper does.

The keys and values pass through an attention function of ours (transformers' AttentionInterface) and not through a
cache object, because transformers drops caches under gradient checkpointing.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface

from vllm_idlm.training.layout import Batch, visible

ATTENTION = "idlm_training"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass
class _Step:
    """What the attention function does besides attending; one step at a time."""

    keep: bool = False
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)  # layer -> K, V of clean rows
    prefix: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None
    who: Any = None  # who sees whom: a list of `Segment`, or FlexAttention's block mask


_step = _Step()


def _set(step: _Step) -> _Step:
    global _step
    _step = step
    return step


def _attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_: Any):
    """Attention of [rows, heads, queries, dim] over own keys, behind the clean rows' if the step brings them."""
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast rotary leaves them in float32
    if _step.keep:
        _step.kept[module.layer_idx] = (key, value)
    if _step.prefix is not None:
        before = _step.prefix[module.layer_idx]
        key, value = torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)
    if isinstance(_step.who, list):
        out = _by_segments(query, key, value, _step.who, scaling)
    else:
        out = _flex()(query, key, value, block_mask=_step.who, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class Segment:
    """Clean places or masks of one sample of a row: they meet its clean places, and masks those of their own block."""

    row: int
    queries: slice
    keys: slice  # the sample's clean places
    seen: torch.Tensor  # [queries, keys] bool
    block: torch.Tensor | None = None  # [queries, B] int64: the keys of a mask's own block
    block_seen: torch.Tensor | None = None  # [queries, B] bool


def _by_segments(query, key, value, parts: list[Segment], scaling: float | None) -> torch.Tensor:
    """Attention sample by sample, so that a packed row costs no more than its samples: for devices without Flex.

    Products with the clean keys, a few more with the mask's own block, one float32 softmax over both: in bfloat16 on a
    CPU faster than the fused kernel, and masks of other blocks cost nothing.
    """
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    out = torch.zeros_like(query)  # padding attends to nothing
    for part in parts:
        q = query[part.row, :, part.queries]
        out[part.row, :, part.queries] = _of_segment(q, key[part.row], value[part.row], part, scaling)
    return out


def _of_segment(q, key, value, part: Segment, scaling: float) -> torch.Tensor:
    """[query heads, queries, dim] from q of that shape and all keys and values [heads, keys, dim] of the row."""
    heads, count, dim = key.shape[0], q.shape[1], q.shape[2]
    q = q.reshape(heads, -1, count, dim)  # [heads, groups, queries, dim]
    groups = q.shape[1]
    k, v = key[:, part.keys], value[:, part.keys]
    scores = torch.bmm(q.reshape(heads, groups * count, dim), k.transpose(1, 2)).float().view(heads, groups, count, -1)
    scores = scores.masked_fill(~part.seen, float("-inf"))
    if part.block is not None:
        own_k, own_v = (x.index_select(1, part.block.flatten()).view(heads, 1, count, -1, dim) for x in (key, value))
        own = (q.unsqueeze(3) * own_k).sum(-1, dtype=torch.float32)  # [heads, groups, queries, B]
        scores = torch.cat([scores, own.masked_fill(~part.block_seen, float("-inf"))], -1)
    weights = (scores * scaling).softmax(-1).to(v.dtype)
    length = k.shape[1]
    out = torch.bmm(weights[..., :length].reshape(heads, groups * count, length), v).view(heads, groups, count, dim)
    if part.block is not None:
        out = out + (weights[..., length:].unsqueeze(-1) * own_v).sum(3)
    return out.reshape(heads * groups, count, dim)


_compiled: dict[str, Any] = {}


def _flex():
    import torch._dynamo
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # one a shape: see `padded`
    return _compiled.setdefault("flex", torch.compile(flex_attention, fullgraph=True))


AttentionInterface.register(ATTENTION, _attend)


def load(model: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """A causal LM with our attention. Raises ValueError for an architecture that training was not written for."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    check_family(config)
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation=ATTENTION).to(device)


def check_family(config: Any) -> None:
    """ValueError unless the architecture is one that our layout of masks is right for (causal, full attention)."""
    kind = config.model_type
    if kind not in FAMILIES:
        raise ValueError(f"model: architecture {kind!r} cannot be trained; allowed are {', '.join(FAMILIES)}")
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise ValueError(
            f"model: {kind} with a sliding window of {config.sliding_window} tokens cannot be trained: masks see the "
            "whole prefix. Fix: a checkpoint without sliding_window in its config.json"
        )


def padded(batch: Batch, length: int) -> Batch:
    """The batch as FlexAttention wants it on a GPU: `length` clean places, masks in a multiple of 512; few shapes."""
    return to_blocks(batch, length) if batch.tokens.device.type == "cuda" else batch


def to_blocks(batch: Batch, length: int) -> Batch:
    """`padded`, on any device."""
    return batch.widened(-(-length // 128) * 128, -(-batch.start.shape[1] // 512) * 512)


def who_sees_whom(batch: Batch, clean: bool, masks: bool) -> Any:
    """FlexAttention's block mask on a GPU, elsewhere a list of segments with dense masks."""
    return (block_mask if batch.tokens.device.type == "cuda" else segments)(batch, clean, masks)


def block_mask(batch: Batch, clean: bool, masks: bool) -> Any:
    """FlexAttention's block mask: clean queries (if `clean`), then mask queries (if `masks`), over keys likewise."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, length = batch.tokens.shape
    extra = batch.start.shape[1] if masks else 0
    seen = visible(batch, clean, masks)
    queries = (length if clean else 0) + extra
    return create_block_mask(
        lambda b, _, q, k: seen(b, q, k), rows, None, queries, length + extra, device=batch.tokens.device
    )


def segments(batch: Batch, clean: bool, masks: bool) -> list[Segment]:
    """The samples of every row with what their clean places (if `clean`) and masks (if `masks`) see."""
    length, first = batch.tokens.shape[1], batch.tokens.shape[1] if clean else 0
    found = []
    for row in range(batch.tokens.shape[0]):
        for number in range(int(batch.sample[row].max()) + 1):
            own = _span(batch.sample[row] == number)
            places = torch.arange(own.start, own.stop)
            if clean:
                found.append(Segment(row, own, own, places[None] <= places[:, None]))
            of_masks = _span((batch.start[row] >= own.start) & (batch.start[row] < own.stop)) if masks else slice(0, 0)
            if of_masks.start < of_masks.stop:
                start, depth = batch.start[row, of_masks], batch.depth[row, of_masks]
                index = torch.arange(of_masks.start, of_masks.stop)
                block = length + (index - depth)[:, None] + torch.arange(int(depth.max()) + 1)[None]  # side by side
                block_seen = torch.arange(block.shape[1])[None] <= depth[:, None]
                queries = slice(first + of_masks.start, first + of_masks.stop)
                seen = places[None] < start[:, None]
                found.append(Segment(row, queries, own, seen, torch.where(block_seen, block, length), block_seen))
    return found


def _span(of: torch.Tensor) -> slice:
    """The slice that the True entries of a [n] bool tensor make; they lie side by side."""
    places = of.nonzero()[:, 0]
    return slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, 0)


@dataclass
class Clean:
    """What the clean rows leave behind: hidden states [rows, L, hidden] and each layer's keys and values."""

    hidden: torch.Tensor
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]]


def _unused(batch: Batch) -> torch.Tensor:
    """A mask of four dimensions, which transformers passes on as it is; our attention goes by `_Step.who`."""
    return torch.empty(batch.tokens.shape[0], 1, 1, 1, device=batch.tokens.device)


def decoder(model: Any) -> Any:
    """The stack of layers below the language model's head, with or without an adapter around it."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).model


def head(model: Any) -> torch.Tensor:
    """[vocabulary, hidden] the output embedding."""
    return model.get_output_embeddings().weight


@torch.no_grad()
def clean(model: Any, batch: Batch) -> Clean:
    """The clean rows through the base model, its adapter (if it has one) off: bit for bit the base's own forward."""
    adapter_off = model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext()
    step = _set(_Step(keep=True, who=who_sees_whom(batch, clean=True, masks=False)))
    with adapter_off:
        hidden = decoder(model)(
            input_ids=batch.tokens,
            position_ids=batch.positions,
            attention_mask=_unused(batch),
            use_cache=False,
        ).last_hidden_state
    return Clean(hidden, step.kept)


def masks(model: Any, batch: Batch, before: Clean, mask_token_id: int) -> torch.Tensor:
    """Hidden states of the mask rows [rows, M, hidden] over a clean pass, with the adapter.

    The clean keys and values stay in place until the next forward: checkpointed layers run again in backward.
    """
    _set(_Step(prefix=before.kept, who=who_sees_whom(batch, clean=False, masks=True)))
    return decoder(model)(
        input_ids=torch.full_like(batch.place, mask_token_id),
        position_ids=batch.mask_positions(),
        attention_mask=_unused(batch),
        use_cache=False,
    ).last_hidden_state


def both(model: Any, batch: Batch, mask_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of clean rows [rows, L, hidden] and mask rows [rows, M, hidden], in one forward of both."""
    _set(_Step(who=who_sees_whom(batch, clean=True, masks=True)))
    length = batch.tokens.shape[1]
    hidden = decoder(model)(
        input_ids=torch.cat([batch.tokens, torch.full_like(batch.place, mask_token_id)], 1),
        position_ids=torch.cat([batch.positions, batch.mask_positions()], 1),
        attention_mask=_unused(batch),
        use_cache=False,
    ).last_hidden_state
    return hidden[:, :length], hidden[:, length:]
