"""`"coverage": "auto"` on Model Runner V2: how many slots the scheduler gives the rows of a step.

There the device alone knows what was drafted and accepted while a step is laid out, and all rows of a step have one
width, which the scheduler says. So the choice is the scheduler's, the same for all ranks: from acceptance as it comes
home with the tokens, a step or two late, and from the time between one step's tokens and the next one's, which is
what a step takes on a device that is kept busy. Nothing waits for the device.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from typing import Any

import numpy as np

from vllm_idlm import settings as isd_settings
from vllm_idlm.proposers.coverage import Choice, choose_width, settle, width
from vllm_idlm.proposers.estimates import Acceptance, Cost

log = logging.getLogger("vllm.idlm")  # below vLLM's logger, so that it is printed as vLLM's lines are
MEASURED = "isd_rows"  # additional_config: what a worker measured, once it is warm


def paced(vllm_config: Any) -> bool:
    """Whether an engine with this configuration has a Pace."""
    found = isd_settings.of(vllm_config)
    return found is not None and found.coverage == "auto" and vllm_config.use_v2_model_runner


def measured(worker: Any) -> dict[str, Any] | None:
    """On a worker: what `Pace.start` takes. For vLLM's `collective_rpc`."""
    return getattr(getattr(worker.model_runner, "isd", None), "measured", None)


def _has_noise_of_its_own(params: Any) -> bool:
    """Whether a request is drawn by its own seed, with drafts."""
    seeded = params is not None and params.seed is not None and params.temperature != 0
    return seeded and isd_settings.wants_isd(params)


class Pace:
    """Takes the place of a scheduler's `dynamic_sd_lookup`: indexed by the requests of a step, it gives slots of a row.

    Slots as `coverage.width` has them; 0 is plain decoding. Under full CUDA graphs only widths that these have.
    """

    _EVERY = 8  # steps between choices while the number of requests stays

    def __init__(self, scheduler: Any) -> None:
        """scheduler: vLLM's Scheduler, of an engine that runs ISD with `"coverage": "auto"`."""
        self._scheduler = scheduler
        self._settings = isd_settings.of(scheduler.vllm_config)
        self.acceptance = Acceptance(self._settings.masks)
        self.cost: Cost | None = None
        self.choice: Choice | None = None
        self._most = 0  # extra groups that the workers can carry
        self._widths: frozenset[int] = frozenset()  # that the workers have full graphs for; empty: any
        self._requests = self._age = 0
        self._last: tuple[float, frozenset[str]] = (0.0, frozenset())  # when tokens came, and whose
        if found := scheduler.vllm_config.additional_config.get(MEASURED):
            self.start(**found)
        else:
            log.warning("ISD: no worker said what rows cost: every step has the rows of stride n, without extra groups")

    def start(
        self, rows: list[int], plain: list[float], masked: list[float], groups: int, widths: Collection[int] = ()
    ) -> None:
        """What the workers measured once they were warm (as `Cost` takes it), the extra groups they can carry, and the
        widths of rows, in slots, that they keep full graphs for (none: any is as good)."""
        self.cost, self._most, self._widths = Cost(rows, plain, masked), groups, frozenset(widths)
        log.info("ISD: the scheduler chooses how wide rows are, with up to %d extra groups", groups)

    def __getitem__(self, requests: int) -> int:
        """Slots of a row in a step of that many requests."""
        full = self._settings.stride(requests)
        if self.cost is None or any(_has_noise_of_its_own(r.sampling_params) for r in self._scheduler.running):
            return width(full)  # the text of a request with a seed must not depend on clocks
        self._age += 1
        if self.choice is None or requests != self._requests or self._age >= self._EVERY:
            most = self._most if full == self._settings.n else 0
            acceptance = self.acceptance.by_place()[: full - 1]
            self.choice = settle(choose_width, acceptance, self.cost, requests, most, self._widths)
            self._requests, self._age = requests, 0
        return width(self.choice.stride, len(self.choice.groups))

    def observe(self, scheduled: Any, output: Any) -> None:
        """Learn from a step: its SchedulerOutput, and the ModelRunnerOutput whose tokens have just come."""
        counts, slots = scheduled.num_scheduled_tokens, scheduled.scheduled_spec_decode_tokens
        if not counts:
            return
        now, names = time.perf_counter(), frozenset(counts)
        began, before = self._last
        rows = scheduled.total_num_scheduled_tokens
        decoding = rows == len(counts) + sum(map(len, slots.values()))
        if self.cost is not None and decoding and not names.isdisjoint(before):
            self.cost.observe(rows, bool(slots), now - began)
        self._last = (now, names)
        self.acceptance.fade()
        drafts = getattr(output, "isd_drafts", None)
        if drafts and slots:
            sizes = map(len, output.sampled_token_ids)
            emitted = np.fromiter(sizes, dtype=np.int64, count=len(output.sampled_token_ids))
            real = np.fromiter(drafts.values(), dtype=np.int64, count=len(drafts))
            self.acceptance.count(np.where(emitted > 0, real, 0), emitted - 1)
