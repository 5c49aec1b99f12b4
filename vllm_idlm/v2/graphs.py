"""Full CUDA graphs for rows of more than one width: which ones `auto` keeps to, their captures, and how they are found.

vLLM captures such a graph for so many requests with so many rows each. Its manager makes them for the one width of a
static stride, or for those of a schedule by batch size, up to the batches of each; `auto` may want any of its widths at
any batch size. And it offers a step the graphs of the next larger size alone, whatever width of rows these are for, so
that where there are several widths most steps would find none of theirs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm_idlm import settings as isd_settings
from vllm_idlm.proposers.coverage import width
from vllm_idlm.settings import ISDSettings


def choices(settings: ISDSettings) -> frozenset[int]:
    """Slots of the rows that `auto` chooses from where each takes captures: plain decoding, stride 2, the stride (or
    those of the schedule) without groups, and all groups."""
    strides = {stride for *_, stride in settings.schedule or ((1, None, settings.n),)}
    found = {0} | {width(stride) for stride in strides | {min(2, max(strides))}}
    return frozenset(found | ({settings.slots} if settings.n in strides else set()))


def captured(vllm_config: Any) -> frozenset[int]:
    """Slots of the rows that an engine under `auto` captures full graphs for; empty: any width is as good."""
    settings, mode = isd_settings.of(vllm_config), vllm_config.compilation_config.cudagraph_mode
    if settings is None or settings.coverage != "auto" or mode is None:
        return frozenset()
    return choices(settings) if mode.has_full_cudagraphs() and mode.separate_routine() else frozenset()


def extend(manager: Any, full: Any) -> None:
    """Add the captures of all widths to vLLM's CudaGraphManager, and offer each step those of its own.

    full: vLLM's CUDAGraphMode.FULL. Graphs for rows of any number (varlen) are left alone. With a draft adapter every
    step has one, so none is captured without.
    """
    from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

    widths, adapter = captured(manager.vllm_config), isd_settings.of(manager.vllm_config).lora is not None
    captures = manager._capture_descs.setdefault(full, []) if widths else manager._capture_descs.get(full, [])
    uniform = [graph for graph in captures if graph.uniform_token_count is not None]
    if manager.varlen_decode or not (uniform or widths):
        return
    sizes, most = manager.compilation_config.cudagraph_capture_sizes, manager.max_num_reqs
    room = manager.compilation_config.max_cudagraph_capture_size
    for rows in (1 + slots for slots in widths):
        for requests in sorted({size for size in sizes if size <= most} | {most}):
            for loras in (case for case in manager.lora_capture_cases if case or not adapter):
                graph = BatchExecutionDescriptor(
                    cg_mode=full, num_tokens=requests * rows, num_reqs=requests, uniform_token_count=rows,
                    num_active_loras=loras,
                )  # fmt: skip
                if graph.num_tokens <= room and graph not in uniform:
                    uniform.append(graph)
                    captures.append(graph)
    captures.sort(key=lambda graph: graph.num_tokens, reverse=True)  # vLLM's order: the largest first
    _offer(manager._candidates, uniform)


def _offer(candidates: dict[tuple[int, int], list], graphs: Iterable[Any]) -> None:
    """Put each graph first for the tokens from which on it is the smallest of its width."""
    begin: dict[tuple, int] = {}
    for graph in sorted(graphs, key=lambda graph: graph.num_tokens):
        kind = (graph.uniform_token_count, graph.num_active_loras, graph.num_ubatches)
        for tokens in range(begin.get(kind, 0), graph.num_tokens + 1):
            offered = candidates.setdefault((tokens, graph.num_active_loras), [])
            if graph not in offered:
                offered.insert(0, graph)
        begin[kind] = graph.num_tokens + 1
