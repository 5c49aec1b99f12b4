"""ISD's own numbers on `/metrics` and in vLLM's periodic log: forwards by kind, and the tokens they emitted.

Entered by vLLM's own extension point (`vllm.stat_logger_plugins`); an engine without ISD gets no metric from it.

    isd:forwards_total{kind="verify"|"cold"}   decode forwards of requests, with drafts and without
    isd:tokens_total                           tokens that they emitted
    isd:rows_total                             rows of the model that they took, masks behind prompts among them

so rows per token is `isd:rows_total` over `isd:tokens_total`, and TPF over the last minute is
`sum(rate(isd:tokens_total[1m])) / sum(rate(isd:forwards_total[1m]))`.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from vllm_idlm import settings

log = logging.getLogger("vllm.idlm")  # below vLLM's logger, so that it is printed as vLLM's lines are
_LABELS = ("model_name", "engine")


@functools.cache
def _counters() -> tuple[Any, Any, Any]:
    """The counters, once a process: engines share them by their labels."""
    from prometheus_client import Counter

    return (
        Counter("isd:forwards", "Decode forwards of requests, by kind.", ("kind", *_LABELS)),
        Counter("isd:tokens", "Tokens emitted by decode forwards.", _LABELS),
        Counter("isd:rows", "Rows of decode forwards: pending tokens, drafts, mask slots.", _LABELS),
    )


class ISDStatLogger(StatLoggerBase):
    """Counts from what vLLM's scheduler and output processor report of every step."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.on = settings.runs_isd(vllm_config)
        self.verify = self.cold = self.tokens = 0  # since the last line in the log
        if self.on:
            names = vllm_config.model_config.served_model_name
            labels = (names if isinstance(names, str) else names[0], str(engine_index))
            forwards, tokens, rows = _counters()
            self._verify, self._cold = forwards.labels("verify", *labels), forwards.labels("cold", *labels)
            self._tokens, self._rows = tokens.labels(*labels), rows.labels(*labels)

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """One step's statistics. A request's decode forward is one gap between its tokens, whatever it emitted."""
        if not self.on or iteration_stats is None:
            return
        found = scheduler_stats.spec_decoding_stats if scheduler_stats is not None else None
        verify = found.num_drafts if found is not None else 0
        cold = max(len(iteration_stats.inter_token_latencies_iter) - verify, 0)
        tokens = max(iteration_stats.num_generation_tokens - len(iteration_stats.time_to_first_tokens_iter), 0)
        self._verify.inc(verify)
        self._cold.inc(cold)
        self._tokens.inc(tokens)
        # The ledger (masks-are-no-drafts) puts the slots there, those of steps that verified nothing into the next.
        self._rows.inc(verify + cold + (found.num_draft_tokens_per_pos[-1] if found is not None else 0))
        self.verify, self.cold, self.tokens = self.verify + verify, self.cold + cold, self.tokens + tokens

    def log_engine_initialized(self) -> None:
        """Nothing to say yet."""

    def log(self) -> None:
        """A line since the last one, if anything was decoded."""
        if forwards := self.verify + self.cold:
            log.info(
                "ISD: %.2f tokens per forward (%d forwards, %.0f%% of them verified drafts)",
                self.tokens / forwards, forwards, 100 * self.verify / forwards,
            )  # fmt: skip
        self.verify = self.cold = self.tokens = 0
