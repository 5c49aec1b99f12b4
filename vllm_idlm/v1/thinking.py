"""A thinking budget over the rows of a verify forward.

vLLM's ThinkingBudgetStateHolder is a state machine that plain decoding advances by one token a step. Its state at a
verified row is what plain decoding would have reached there: the state at the last emitted token (kept here, advanced
token by token), advanced over the drafts before the row.
"""

from __future__ import annotations

import copy
from typing import Any


def _advance(holder: Any, state: dict, output: list[int]) -> None:
    """One step of plain decoding: `output` is all output so far, one token longer than at the last call."""
    state["output_tok_ids"], state["spec_token_ids"] = output, []
    state["in_spec_mode"], state["force_index"] = False, []
    holder._update_think_state(state)


def _committed(holder: Any, request: int, output: list[int]) -> dict:
    """The request's state as plain decoding would have it before drawing the token that follows `output`."""
    source = holder._state[request]
    kept = source.get("isd")
    if kept is None:
        prompt, budget = source["prompt_tok_ids"], source["thinking_token_budget"]
        state = holder._init_state_entry(prompt, budget)
        kept = source["isd"] = {"state": state, "length": -1}
    for length in range(kept["length"] + 1, len(output) + 1):
        _advance(holder, kept["state"], output[:length])
    kept["length"] = len(output)
    return kept["state"]


def thinking_rows(sampling: Any, rows: Any) -> Any:
    """A holder over rows (None if the batch tracks no budget), ready for vLLM's `Sampler.apply_logits_processors`."""
    holder = sampling.thinking_budget_state_holder
    if holder is None or not holder.has_tracked_requests():
        return None
    states: dict[int, dict] = {}
    for request in holder._state:
        output = list(sampling.output_token_ids[request])
        state = _committed(holder, request, output)
        for place, row in enumerate(rows.of(request)):
            if place:
                state = copy.deepcopy(state)
                _advance(holder, state, [*output, *rows.drafts[request][:place]])
            states[row] = state
    return _RowHolder(holder, states)


class _RowHolder:
    """Stands in for a ThinkingBudgetStateHolder whose states are already up to date, one a row."""

    def __init__(self, holder: Any, states: dict[int, dict]) -> None:
        self._rows = copy.copy(holder)
        self._rows._state = states
        self._rows.in_spec_mode, self._rows.num_spec_tokens = False, 0

    def has_tracked_requests(self) -> bool:
        return True

    def update_state(self, *_: Any, **__: Any) -> None:
        """Nothing to do: every row's state was advanced when it was made."""

    def apply_to_logits(self, logits: Any, predict_bonus_token: bool, spec_token_ids: Any) -> Any:
        return self._rows.apply_to_logits(logits, False, None)
