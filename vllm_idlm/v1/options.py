"""Every sampling option of a request, applied to each of its verified rows as if that row were a plain request.

A verify forward has k + 1 rows of one request, each with its own prefix (the output so far, plus the drafts before it).
`as_plain_rows` lays vLLM's SamplingMetadata out over rows instead of requests, so that vLLM's own
`Sampler.apply_logits_processors` does to each row exactly what plain decoding would do, in the same order.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)

from vllm_idlm.v1.thinking import thinking_rows


class Rows:
    """Which request each verified row belongs to, and its prefix.

    owner: [R] request index of each row (host list); drafts: per request, its drafts. Request i has len(drafts[i]) + 1
    consecutive rows.
    """

    def __init__(self, drafts: Sequence[Sequence[int]], device: torch.device) -> None:
        self.drafts = drafts
        self.owner = [i for i, own in enumerate(drafts) for _ in range(len(own) + 1)]
        self.place = [j for own in drafts for j in range(len(own) + 1)]  # drafts before the row
        self.index = torch.tensor(self.owner, device=device)  # [R] int64
        self._first = list(itertools.accumulate((len(own) + 1 for own in drafts), initial=0))

    def of(self, request: int) -> range:
        """The rows of a request."""
        return range(self._first[request], self._first[request + 1])

    def prefixes(self, outputs: Sequence[list[int]]) -> list[list[int]]:
        """The output tokens before each row: the request's own, then the drafts before the row."""
        if not outputs:
            return []
        return [[*outputs[i], *self.drafts[i][:j]] for i, j in zip(self.owner, self.place, strict=True)]


def _pick(tensor: torch.Tensor | None, index: torch.Tensor) -> torch.Tensor | None:
    return None if tensor is None else tensor[index]


def needs_processing(sampling: Any) -> bool:
    """Whether any request of the batch has an option that changes logits before temperature."""
    holder = sampling.thinking_budget_state_holder
    return bool(
        not sampling.no_penalties
        or sampling.allowed_token_ids_mask is not None
        or sampling.bad_words_token_ids
        or (holder is not None and holder.has_tracked_requests())
        or any(_active(p) for p in sampling.logitsprocs.non_argmax_invariant)
    )


def _active(processor: Any) -> bool:
    if isinstance(processor, MinTokensLogitsProcessor):
        return bool(processor.min_toks)
    if isinstance(processor, LogitBiasLogitsProcessor):
        return bool(processor.biases)
    return True


def as_plain_rows(sampling: Any, rows: Rows) -> Any:
    """`sampling` (vLLM's SamplingMetadata, one entry a request) as one entry a verified row, no speculation in it."""
    some = not sampling.no_penalties
    pick = rows.index
    return replace(
        sampling,
        temperature=_pick(sampling.temperature, pick),
        top_p=_pick(sampling.top_p, pick),
        top_k=_pick(sampling.top_k, pick),
        generators={},
        prompt_token_ids=_pick(sampling.prompt_token_ids, pick) if some else None,
        frequency_penalties=sampling.frequency_penalties[pick] if some else sampling.frequency_penalties,
        presence_penalties=sampling.presence_penalties[pick] if some else sampling.presence_penalties,
        repetition_penalties=sampling.repetition_penalties[pick] if some else sampling.repetition_penalties,
        output_token_ids=rows.prefixes(sampling.output_token_ids),
        allowed_token_ids_mask=_pick(sampling.allowed_token_ids_mask, pick),
        bad_words_token_ids={
            row: words for request, words in sampling.bad_words_token_ids.items() for row in rows.of(request)
        },
        logitsprocs=LogitsProcessors(over_rows(p, rows) for p in sampling.logitsprocs.all),
        spec_token_ids=None,
        thinking_budget_state_holder=thinking_rows(sampling, rows),
    )


def over_rows(processor: Any, rows: Rows) -> Any:
    """One of vLLM's built-in logits processors with its per-request state laid out over rows."""
    if isinstance(processor, MinTokensLogitsProcessor):
        return _min_tokens(processor, rows)
    if isinstance(processor, LogitBiasLogitsProcessor):
        return _logit_bias(processor, rows)
    if isinstance(processor, MinPLogitsProcessor):
        return _min_p(processor, rows)
    raise NotImplementedError(f"{type(processor).__name__} cannot be laid out over the rows of a verify forward")


def _min_tokens(found: MinTokensLogitsProcessor, rows: Rows) -> MinTokensLogitsProcessor:
    new = object.__new__(MinTokensLogitsProcessor)
    new.device, new.neg_inf_tensor = found.device, found.neg_inf_tensor
    new.min_toks = {}
    for request, (least, output, stops, structured) in found.min_toks.items():
        for place, row in enumerate(rows.of(request)):
            if len(output) + place < least:
                new.min_toks[row] = (least, output, stops, structured)
    pairs = [(row, stop) for row, (_, _, stops, _) in new.min_toks.items() for stop in stops]
    restore = [(row, stop) for row, (_, _, stops, structured) in new.min_toks.items() if structured for stop in stops]
    new.logits_slice, new.restore_logits_slice = _index(pairs, found.device), _index(restore, found.device)
    return new


def _index(pairs: list[tuple[int, int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.tensor(pairs, dtype=torch.int64, device=device).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _logit_bias(found: LogitBiasLogitsProcessor, rows: Rows) -> LogitBiasLogitsProcessor:
    new = object.__new__(LogitBiasLogitsProcessor)
    new.device = found.device
    new.biases = {row: bias for request, bias in found.biases.items() for row in rows.of(request)}
    pairs = [(row, token) for row, bias in new.biases.items() for token in bias]
    new.logits_slice = _index(pairs, found.device)
    values = [value for bias in new.biases.values() for value in bias.values()]
    new.bias_tensor = torch.tensor(values, dtype=torch.float32, device=found.device)
    return new


def _min_p(found: MinPLogitsProcessor, rows: Rows) -> MinPLogitsProcessor:
    new = object.__new__(MinPLogitsProcessor)
    new.min_p_count = found.min_p_count
    new.min_p = found.min_p[rows.index] if found.min_p_count else found.min_p
    return new
