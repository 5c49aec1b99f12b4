"""Mask slots behind the last token of a prompt, so that an answer's first decode forward has drafts to verify.

vLLM's scheduler gives speculative slots to requests that decode. But the forward that ends a prompt (or what a
preempted request computes anew) emits a token like any other, and is a cold row with a long prefix: masks behind it
draft. Here a step's SchedulerOutput is widened by them, once vLLM has settled it and before the scheduler counts what
it scheduled.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_idlm import settings as isd_settings
from vllm_idlm.proposers.state import MASK, plan_slots

_PLAIN = 6  # an answer's last few forwards have no slots either


class PromptMasks:
    """One scheduler's masks behind prompts."""

    def __init__(self, scheduler: Any) -> None:
        """scheduler: vLLM's Scheduler, of an engine that runs ISD."""
        self._scheduler = scheduler
        self._settings = isd_settings.of(scheduler.vllm_config)
        self._without = 0  # decoding steps in a row in which nothing had slots
        # Both have been told of a step's blocks before it gets here.
        self._off = scheduler.connector is not None or scheduler.needs_kv_cache_zeroing

    def widen(self, output: Any) -> None:
        """Give the requests whose prompts end in `output` (a SchedulerOutput) their masks, as far as there is room.

        The scheduler's requests still stand as before the step. One that gets no masks starts with a cold forward; its
        text is the same.
        """
        if self._off:
            return
        ending = list(self._ending(output))
        if not ending:
            self._without = 0 if output.scheduled_spec_decode_tokens else self._without + 1
            return
        plain = self._settings.coverage == "auto" and self._without >= _PLAIN  # the choice of the moment
        masks = 0 if plain else self._settings.stride(len(output.num_scheduled_tokens)) - 1
        for request in ending:
            padded = len(output.scheduled_spec_decode_tokens.get(request.request_id, ()))
            wanted = self._masks(request, masks)
            if not (padded and wanted and self._scheduler.use_v2_model_runner):  # V2 has graphs of full rows alone
                self._resize(output, request, wanted - padded)

    def _prefills(self, output: Any) -> set[str]:
        """The requests of the step that run over a prompt, or compute anew what a preemption lost."""
        begun = {data.req_id for data in output.scheduled_new_reqs} | set(output.scheduled_cached_reqs.resumed_req_ids)
        return begun | {r.request_id for r in self._scheduler._inflight_prefills}

    def _ending(self, output: Any) -> Iterator[Any]:
        """Those of them whose last known token is in this step."""
        for name in self._prefills(output):
            if count := output.num_scheduled_tokens.get(name):
                request = self._scheduler.requests[name]
                slots = len(output.scheduled_spec_decode_tokens.get(name, ()))
                if request.num_computed_tokens + count - slots == request.num_tokens:
                    yield request

    def _masks(self, request: Any, masks: int) -> int:
        """Masks that are of use behind the request's last token.

        None for a seeded request: whether there is room depends on its company, and its noise on what was drafted.
        """
        params = request.sampling_params
        if params is None or params.seed is not None or params.prompt_logprobs is not None:
            return 0
        if request.resumable or not isd_settings.wants_isd(params):
            return 0
        left = self._scheduler.max_model_len - request.num_tokens
        return plan_slots(0, masks, min(request.max_tokens - request.num_output_tokens, left))[1]

    def _resize(self, output: Any, request: Any, more: int) -> None:
        """Add `more` mask slots to the request's row of the step, as far as there is room, or take -`more` away."""
        name = request.request_id
        more = min(more, self._scheduler.max_num_scheduled_tokens - output.total_num_scheduled_tokens)
        count = output.num_scheduled_tokens[name] + more
        if more > 0:
            blocks = self._scheduler.kv_cache_manager.allocate_slots(request, count)
            if blocks is None:
                return
            _hand_over(output, name, blocks.get_block_ids(allow_none=True))
        slots = len(output.scheduled_spec_decode_tokens.pop(name, ())) + more
        if slots:
            output.scheduled_spec_decode_tokens[name] = [MASK] * slots
        output.num_scheduled_tokens[name] = count
        output.total_num_scheduled_tokens += more


def _hand_over(output: Any, name: str, blocks: tuple[list[int], ...] | None) -> None:
    """Tell the workers of the blocks that the masks needed, behind those the request was given in this step."""
    if blocks is None:
        return
    for data in output.scheduled_new_reqs:
        if data.req_id == name:
            data.block_ids = _joined(data.block_ids, blocks)
            return
    cached = output.scheduled_cached_reqs
    place = cached.req_ids.index(name)
    cached.new_block_ids[place] = _joined(cached.new_block_ids[place], blocks)


def _joined(held: tuple[list[int], ...] | None, more: tuple[list[int], ...]) -> tuple[list[int], ...]:
    return more if held is None else tuple([*a, *b] for a, b in zip(held, more, strict=True))
