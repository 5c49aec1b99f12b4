"""Faults in the state machine of a request, in what is chosen to be covered, and in the reference decoder."""

from tests.mutations.fault import Fault

_STATE, _COVERAGE, _REFERENCE = "proposers/state.py", "proposers/coverage.py", "proposers/reference.py"
_UNIT = "tests/unit/proposers"
_FORWARDS = "tests/engine/test_proposer.py::test_each_forward_equals_the_reference"
_ROWS = (f"{_UNIT}/test_state.py", f"{_FORWARDS}[4-all-gated]", "tests/engine/test_proposer.py")
_CHOICES = (f"{_UNIT}/test_coverage.py",)
_DECODE = (
    f"{_UNIT}/test_reference.py::test_sampled_answers_follow_the_models_own_distribution",
    f"{_UNIT}/test_reference.py",
)

FAULTS = [
    Fault(
        "group-of-one-draft-more", "proposers", _STATE,
        old="            if j == accepted:\n",
        new="            if j == accepted + 1:\n",
        says="After a rejection the next drafts come from masks that saw the rejected draft: rarely right.",
        tests=_ROWS,
    ),
    Fault(
        "groups-all-at-the-first-place", "proposers", _STATE,
        old="            place += m\n",
        new="            place += 0\n",
        says="Drafts behind a rejection come from another group's masks: rarely right.",
        tests=_ROWS,
    ),
    Fault(
        "masks-behind-a-rejection-propose", "proposers", _STATE,
        old="        if accepted == len(self.drafts):\n            return 0, self.masks",
        new="        if accepted == len(self.drafts) or not self.extra:\n            return 0, self.masks",
        says="After a rejection drafts are taken from masks that saw the rejected draft: no cold forward, no gain.",
        tests=(f"{_FORWARDS}[4-last-gated]", f"{_FORWARDS}[2-last-gated]", *_ROWS),
    ),
    Fault(
        "one-draft-beyond-the-end", "proposers", _STATE,
        old="    drafts = min(num_proposals, max(remaining - 1, 0))",
        new="    drafts = min(num_proposals, max(remaining, 0))",
        says="An answer's last forward verifies a draft too many: tokens behind max_tokens are counted.",
        tests=(
            f"{_UNIT}/test_reference.py",
            "tests/engine/test_proposer.py",
            "tests/engine/test_proposer_forced_drafts.py",
        ),
    ),
    Fault(
        "cut-row-keeps-its-groups", "proposers", _STATE,
        old="_cut(known.extra, masks - known.masks)",
        new="_cut(known.extra, masks)",
        says="A row that the token budget cut short is taken to have groups that were not computed.",
        tests=(f"{_UNIT}/test_state.py", "tests/engine/test_scheduler.py::test_chunked_prompts_and_rows"),
    ),
    Fault(
        "masks-in-the-place-of-drafts", "proposers", _STATE,
        old="        return [*row.drafts, *[MASK] * row.all_masks]",
        new="        return [*[MASK] * row.all_masks, *row.drafts]",
        says="The scheduler is told of masks in front of the drafts: no draft is ever verified.",
        tests=_ROWS,
    ),
    Fault(
        "chance-of-the-draft-before", "proposers", _COVERAGE,
        old="        found.append(reached * (1 - rate))\n        reached *= rate",
        new="        reached *= rate\n        found.append(reached * (1 - rate))",
        says="auto mistakes how likely each rejection is, and carries the wrong groups.",
        tests=_CHOICES,
    ),
    Fault(
        "cold-forwards-take-no-time", "proposers", _COVERAGE,
        old="            rate = requests * (tokens + missed) / (taken + missed * cold)",
        new="            rate = requests * (tokens + missed) / taken",
        says="auto takes cold forwards for free, carries too few groups and is slower than it could be.",
        tests=_CHOICES,
    ),
    Fault(
        "v2-cold-forwards-take-no-time", "proposers", _COVERAGE,
        old="            rate = requests * (tokens + missed) / ((1 + missed) * taken)",
        new="            rate = requests * (tokens + missed) / taken",
        says="auto on Model Runner V2 takes cold forwards for free and chooses rows that are too narrow.",
        tests=_CHOICES,
    ),
    Fault(
        "groups-where-they-do-not-pay", "proposers", _COVERAGE,
        old="if chances[j] * choice.value > choice.price",
        new="if chances[j] * choice.value < choice.price",
        says="auto carries exactly the groups that do not pay.",
        tests=_CHOICES,
    ),
    Fault(
        "drafts-behind-a-rejection-are-counted", "proposers", "proposers/estimates.py",
        old="enumerate(confidence[: accepted + 1])",
        new="enumerate(confidence)",
        says="auto takes later drafts for worse than they are, and shortens its stride.",
        tests=(f"{_UNIT}/test_estimates.py", *_CHOICES),
    ),
    Fault(
        "confidence-of-another-place", "proposers", "proposers/estimates.py",
        old="            accepted, tried = self._counts[place, bisect_right(_EDGES, q)]",
        new="            accepted, tried = self._counts[0, bisect_right(_EDGES, q)]",
        says="auto judges every draft by what became of first ones.",
        tests=(f"{_UNIT}/test_estimates.py", *_CHOICES),
    ),
    Fault(
        "reference-residual-is-p", "proposers", _REFERENCE,
        old="                return [*emitted, self.draw((p - q).clamp(min=0))]",
        new="                return [*emitted, self.draw(p)]",
        says="The reference decoder, which everything is compared with, is biased itself.",
        tests=_DECODE,
    ),
    Fault(
        "reference-adapter-on-the-last-clean-row", "proposers", _REFERENCE,
        old="    gate = torch.arange(len(tokens), device=device) >= len(tokens) - masks",
        new="    gate = torch.arange(len(tokens), device=device) >= len(tokens) - masks - 1",
        says="The reference decoder's answers depend on the draft adapter.",
        tests=(
            f"{_UNIT}/test_reference.py::test_greedy_equals_plain_with_an_adapter_that_drafts_badly",
            *_DECODE,
        ),
    ),
]  # fmt: skip
