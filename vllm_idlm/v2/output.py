"""A step's counts on their way home: copied beside the tokens, read where vLLM waits for those anyway."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from vllm.v1.worker.gpu.async_utils import async_copy_to_np, stream

from vllm_idlm.proposers.state import Row


@functools.cache
def counting(parent: type) -> type:
    """vLLM's AsyncOutput with ISD's counts; `isd_drafts` of its ModelRunnerOutput maps requests to verified drafts."""

    class CountingOutput(parent):
        def __init__(self, isd: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            step = isd.step
            main, copy = kwargs["main_stream"], kwargs["copy_stream"]
            self._isd = isd
            self._rows = np.diff(step.batch.cu_num_logits_np)
            self._decodes = ~step.batch.is_prefilling_np
            self._device = (step.drafts, step.masks)  # kept alive until the copy is done
            self._ids = None
            with stream(copy, main):
                copy.wait_stream(main)
                self._drafts = async_copy_to_np(step.drafts)
                self._masks = async_copy_to_np(step.masks)
                if isd.stats.trace is not None:
                    self._ids = async_copy_to_np(isd.req_states.draft_tokens[step.batch.idx_mapping])
                self.copy_event.record(copy)

        def get_output(self) -> Any:
            output = super().get_output()
            output.isd_drafts = dict(zip(output.req_ids, self._drafts.tolist(), strict=True))
            emitted = np.fromiter(map(len, output.sampled_token_ids), dtype=np.int64, count=len(self._drafts))
            counted = np.flatnonzero(self._decodes & (emitted > 0))
            self._isd.stats.count(self._drafts[counted], emitted[counted], int(self._rows[counted].sum()))
            if self._ids is not None and self._isd.stats.trace is not None:
                for i in counted.tolist():
                    row = Row(self._ids[i, : self._drafts[i]].tolist(), int(self._masks[i]))
                    self._isd.stats.record(output.req_ids[i], row, output.sampled_token_ids[i])
            return output

    return CountingOutput
