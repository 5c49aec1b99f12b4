"""Extra groups of mask slots in vLLM's attention: which rows they are, and the hooks that compute theirs.

A row with extra groups is `[x, d1..dk, M.., Gi, Gj, ..]` (`proposers.state`). Its first part is causal and stays with
vLLM's own attention; the rows of extra groups are overwritten by `kernels.tail`. The hooks sit on the objects of one
engine (the attention layers' `impl.forward`, the metadata builders' `build`), so that no other engine is touched, and
do nothing in a step without extra groups.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vllm_idlm.kernels.tail import Tail, tail_attention
from vllm_idlm.patching import replace
from vllm_idlm.proposers.state import Row
from vllm_idlm.settings import SettingsError


class Places(NamedTuple):
    """The extra rows of one row, each [E] int64, counted from x (place 0)."""

    row: np.ndarray  # in the row: where its key and value are, too
    position: np.ndarray  # in the sequence
    visible: np.ndarray  # of the row, places 0 .. visible - 1 are seen
    own_first: np.ndarray  # and places own_first .. row


@functools.lru_cache(maxsize=4096)
def places(first: int, extra: tuple[tuple[int, int], ...]) -> Places:
    """Where extra groups stand in a row whose causal part has `first` places."""
    found: list[tuple[int, int, int, int]] = []
    for j, m in extra:
        found += [(first + i, j + 1 + i, j + 1, first) for i in range(m)]
        first += m
    return Places(*np.array(found, dtype=np.int64).reshape(-1, 4).T)


class Plan(NamedTuple):
    """The extra rows of one step: R requests that have them, E rows."""

    requests: np.ndarray  # [R] of the batch
    counts: np.ndarray  # [R] extra rows of each
    starts: np.ndarray  # [R + 1]
    fields: np.ndarray  # [4, E] as Tail.rows
    positions: np.ndarray  # [E] int64, in the sequence

    def tail(self, block_table: Tensor) -> Tail:
        """block_table: [B, blocks], of the batch."""
        device = block_table.device
        table = block_table[torch.from_numpy(self.requests).to(device)].contiguous()
        starts, fields = torch.from_numpy(self.starts).to(device), torch.from_numpy(self.fields).to(device)
        return Tail(table, starts, fields, int(self.counts.max()))


def plan(rows: Sequence[Row], query_start: np.ndarray, computed: np.ndarray) -> Plan | None:
    """The extra rows of a batch; None if it has none.

    query_start: [B], first row of each request in the step; computed: [B], its tokens in the cache, the place of x.
    """
    having = [i for i, row in enumerate(rows) if row.extra]
    if not having:
        return None
    found = [places(1 + len(rows[i].drafts) + rows[i].masks, rows[i].extra) for i in having]
    counts = np.array([len(p.row) for p in found])
    row, position, visible, own_first = (np.concatenate(part) for part in zip(*found, strict=True))
    base, at = np.repeat(computed[having], counts), np.repeat(query_start[having], counts)
    fields = np.stack([at + row, base + visible, base + own_first, base + row + 1]).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return Plan(np.array(having), counts, starts, fields, base + position)


class DevicePlan:
    """The extra rows of a step of Model Runner V2, whose number of drafts only the device knows.

    A full row is `[x, 2 (n - 1) causal slots, G0, G1, ..]` whatever k is; a group behind a draft that is not there is
    computed and not drawn from. All is worked out on the device, from tensors of the step, and written where a CUDA
    graph reads it: a graph captured for R requests finds the rows of a step of up to R at the same addresses.
    """

    def __init__(self, masks: int, groups: Sequence[int], requests: int, device: torch.device) -> None:
        """masks: n - 1 of each group; groups: by the number of drafts accepted, in their order in the row; requests:
        of a batch at most."""
        self.causal = 1 + 2 * masks  # places before the first group
        self.extra = len(groups) * masks
        self._places = [torch.from_numpy(p).to(device) for p in places(self.causal, tuple((j, masks) for j in groups))]
        self.order = torch.full((masks,), -1, device=device)  # by drafts accepted: which group of the row
        self.order[list(groups)] = torch.arange(len(groups), device=device)
        self._fields = torch.empty(4 * requests * self.extra, dtype=torch.int32, device=device)
        self._starts = torch.arange(requests + 1, dtype=torch.int32, device=device) * self.extra
        self._gone = torch.tensor([-1, 0, 0, 0], device=device)[:, None, None]  # the fields of a row that is not there
        self._step: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def begin(self, query_start: Tensor, rows: Tensor, computed: Tensor, positions: Tensor) -> None:
        """A step of B requests: [B + 1] first token rows; [B] rows of a decode, 0 in a prompt; [B] place of x.

        positions: of the step's token rows, to be corrected once vLLM has taken the slots of the cache from them.
        """
        self._step = (query_start, rows, computed, positions)

    def end(self) -> None:
        """The step's forward has run."""
        self._step = None

    def __bool__(self) -> bool:
        return self._step is not None

    def tail(self, block_table: Tensor) -> Tail:
        """The step's rows, all requests with all places; writes their positions.

        block_table: [R, blocks], R >= B: behind the requests of the step a graph may have room for more.
        """
        query_start, rows, computed, positions = self._step
        row, position, visible, own_first = self._places
        base, rows = computed.unsqueeze(1), rows.unsqueeze(1)
        there = row < rows  # [B, E]
        at = query_start[1:].unsqueeze(1) - rows + row
        tail = self.empty(block_table)
        fields = torch.stack([at, base + visible, base + own_first, base + row + 1])
        tail.rows.unflatten(1, (-1, self.extra))[:, : len(rows)] = torch.where(there, fields, self._gone)
        # One row behind the last of the batch takes what is not there: a write without a condition.
        spare = positions.new_empty(len(positions) + 1)
        spare[:-1] = positions
        spare[torch.where(there, at, len(positions)).flatten()] = (base + position).flatten()
        positions.copy_(spare[:-1])
        return tail

    def empty(self, block_table: Tensor) -> Tail:
        """As `tail` of a step without extra rows; a graph captured with it goes on with the rows of each step."""
        requests = len(block_table)
        rows = self._fields[: 4 * requests * self.extra].view(4, requests * self.extra)
        rows.view(4, -1, self.extra).copy_(self._gone)
        return Tail(block_table, self._starts[: requests + 1], rows, self.extra)


class TailAttention:
    """The hooks of one engine. `plan` is set for a step, between the preparation of its inputs and its forward."""

    def __init__(self, plan: DevicePlan | None = None) -> None:
        """plan: of all steps, on Model Runner V2; None: V1, which sets one each step."""
        self.plan: Plan | DevicePlan | None = plan

    def attach(self, runner: Any) -> None:
        """Hook into the attention layers and metadata builders of a runner (of either kind) that has just made these.

        Raises SettingsError if a layer's attention is more than scores, softmax and values of whole sequences.
        """
        config, groups = runner.vllm_config, [group for groups in runner.attn_groups for group in groups]
        layers = {
            name: config.compilation_config.static_forward_context[name] for g in groups for name in g.layer_names
        }
        check_engine(config, runner.device, in_graphs=isinstance(self.plan, DevicePlan))
        for name, layer in layers.items():
            check(name, layer)
        for layer in layers.values():
            if not hasattr(layer.impl, "isd_plain_forward"):
                layer.impl.isd_plain_forward = layer.impl.forward
                replace("object-attention", layer.impl, "forward", _Forward(layer.impl))
        for builder in (b for group in groups for b in group.metadata_builders):
            replace("object-attention", builder, "build", functools.partial(self._build, builder.build))
            captured = functools.partial(self._build_for_capture, builder.build_for_cudagraph_capture)
            replace("object-attention", builder, "build_for_cudagraph_capture", captured)

    def _build(
        self, original: Any, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """A builder's `build`, with vLLM's names for what it takes: it is called by them, too."""
        if not self.plan:
            return original(common_prefix_len, common_attn_metadata, *args, **kwargs)
        common = common_attn_metadata
        tail = self.plan.tail(common.block_table_tensor)
        if common.seq_lens.is_cpu and isinstance(self.plan, Plan):
            common = _without_extra(common, self.plan)
        metadata = original(common_prefix_len, common, *args, **kwargs)
        metadata.isd_tail = tail
        return metadata

    def _build_for_capture(self, original: Any, common_attn_metadata: Any) -> Any:
        """For a full CUDA graph of V2 (V1's are refused): our kernel becomes part of it, unless its rows are narrower.

        Such a graph is also replayed without a step of requests (idle ranks); so it finds no rows then.
        """
        metadata, plan = original(common_attn_metadata), self.plan
        if isinstance(plan, DevicePlan) and common_attn_metadata.max_query_len > plan.causal:
            metadata.isd_tail = plan.empty(common_attn_metadata.block_table_tensor)
        return metadata


def _without_extra(common: Any, plan: Plan) -> Any:
    """The step with each request's extra rows made a request of their own, with the least there is to attend to.

    They are overwritten anyway, and on a CPU attention takes time for each row.
    """
    extra = np.zeros(common.num_reqs, dtype=np.int32)
    extra[plan.requests] = plan.counts
    split = np.flatnonzero(extra)
    start = common.query_start_loc.numpy()
    seq = common.seq_lens.numpy()
    order = np.sort(np.concatenate([np.arange(len(extra)), split]))  # requests in order, split ones twice
    second = np.zeros(len(order), dtype=bool)
    second[1:] = order[1:] == order[:-1]
    begins = np.where(second, start[order + 1] - extra[order], start[order])
    lengths = np.where(second, extra[order], seq[order] - extra[order])
    return dataclasses.replace(
        common,
        query_start_loc=torch.from_numpy(np.append(begins, start[-1]).astype(np.int32)),
        query_start_loc_cpu=torch.from_numpy(np.append(begins, start[-1]).astype(np.int32)),
        seq_lens=torch.from_numpy(lengths.astype(np.int32)),
        num_reqs=len(order),
        block_table_tensor=common.block_table_tensor[torch.from_numpy(order)],
    )


class _Forward:
    """An attention layer's forward: vLLM's own, then the extra rows of the step."""

    def __init__(self, impl: Any) -> None:
        self._impl = impl
        self._cache: Tensor | None = None  # of a CPU alone: vLLM on GPUs makes one for profiling first, and frees it
        self._views: tuple[Tensor, Tensor] | None = None

    def __call__(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any,
        output: Tensor, *args: Any, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        plain = self._impl.isd_plain_forward
        result = plain(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        tail = getattr(attn_metadata, "isd_tail", None)
        if tail is not None:
            tail_attention(output, query, *self._views_of(kv_cache), tail, self._impl.scale)
        return result

    def _views_of(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        if not kv_cache.is_cpu:
            return views(kv_cache)
        if kv_cache is not self._cache:
            self._cache, self._views = kv_cache, views(kv_cache)
        return self._views


def views(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [blocks, heads, tokens, size] in vLLM's cache of one layer [blocks, heads, tokens, 2 size].

    A token's key and value lie side by side; but the CPU backend's blocks are [heads, 2, ..] in truth, with keys as
    [size, tokens], values as [tokens, size].
    """
    blocks, heads, tokens, both = kv_cache.shape
    if not kv_cache.is_cpu:
        keys, values = kv_cache.split(both // 2, dim=-1)
        return keys, values
    halves = kv_cache.view(blocks, heads, 2, tokens * both // 2)
    keys = halves[:, :, 0].unflatten(2, (both // 2, tokens)).transpose(2, 3)
    return keys, halves[:, :, 1].unflatten(2, (tokens, both // 2))


def check_engine(config: Any, device: torch.device, in_graphs: bool = False) -> None:
    """SettingsError if an engine of this VllmConfig cannot have rows at places of their own.

    in_graphs: whether the plan of its steps may be part of a full CUDA graph.
    """
    mode = config.compilation_config.cudagraph_mode
    full = not in_graphs and device.type != "cpu" and mode is not None and mode.has_full_cudagraphs()
    found = {
        'full CUDA graphs of Model Runner V1 (they do on V2, vLLM\'s default on GPUs, and with "cudagraph_mode": '
        '"PIECEWISE" in the compilation config)': full,
        "microbatches (enable_dbo, ubatch_size)": config.parallel_config.use_ubatching,
        "positions of several dimensions (M-RoPE)": config.model_config.uses_mrope,
        "decode context parallelism": config.parallel_config.decode_context_parallel_size > 1,
    }
    _refuse(found, config.model_config.model)


def check(name: str, layer: Any) -> None:
    """SettingsError unless `layer` (a vLLM Attention) is what `kernels.tail` computes."""
    from vllm.model_executor.layers.attention import Attention

    impl = layer.impl
    isa = getattr(layer, "isa", "vec")
    found = {
        f"attention of class {type(layer).__name__}": type(layer) is not Attention,
        "keys and values shared between layers": bool(getattr(impl, "kv_sharing_target_layer_name", None)),
        "a sliding window": getattr(impl, "sliding_window", None) not in (None, -1, (-1, -1)),
        "ALiBi": getattr(impl, "alibi_slopes", None) is not None,
        "a soft cap of its scores": bool(getattr(impl, "logits_soft_cap", None)),
        "attention sinks": getattr(impl, "sinks", None) is not None,
        f"kv_cache_dtype {impl.kv_cache_dtype!r}": impl.kv_cache_dtype not in ("auto", "bfloat16", "float16"),
        f"key layout {isa!r} of the CPU backend": not isa.startswith("vec"),
    }
    _refuse(found, name)


def _refuse(found: dict[str, bool], where: str) -> None:
    for what, is_so in found.items():
        if is_so:
            raise SettingsError(
                f'"coverage": extra groups of mask slots do not run with {what} ({where}); allowed is "last" there'
            )
