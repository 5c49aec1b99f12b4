"""Faults in what is counted: metrics, ISD's own counts, what auto learns from; and in the drafts of the doctor."""

from tests.mutations.fault import Fault

_LEDGER, _STATS = "vllm_idlm/ledger/scheduler.py", "vllm_idlm/v1/stats.py"
_ENGINE, _V2 = "tests/engine", "tests/interpreted/test_speculator.py"
_SERVED = (f"{_ENGINE}/test_serve.py",)
_COUNTED = ("tests/unit/v1/test_stats.py", f"{_ENGINE}/test_proposer_forced_drafts.py")

FAULTS = [
    Fault(
        "masks-are-counted-as-drafts", "counts", _LEDGER,
        old="            r: given.count(-1) if drafts is None",
        new="            r: 0 if drafts is None",
        says="vLLM's metrics count mask slots as drafts, so acceptance looks far worse than it is.",
        tests=_SERVED,
    ),
    Fault(
        "v2-masks-are-counted-as-drafts", "counts", _LEDGER,
        old="else len(given) - drafts.get(r, 0) for r, given",
        new="else 0 for r, given",
        says="vLLM's metrics count mask slots as drafts on Model Runner V2.",
        tests=(f"{_V2}::test_counters", _V2),
    ),
    Fault(
        "cold-forwards-are-counted-as-drafts", "counts", _LEDGER,
        old="    if num_draft_tokens == (num_invalid_spec_tokens or {}).get(request_id, 0):\n",
        new="    if num_draft_tokens == 0:\n",
        says="vLLM's metrics count a cold forward as one whose drafts were all rejected.",
        tests=_SERVED,
    ),
    Fault(
        "slots-are-counted-again", "counts", _LEDGER,
        old="        stats.num_draft_tokens_per_pos[-1] += self.isd_slots\n        self.isd_slots = 0\n",
        new="        stats.num_draft_tokens_per_pos[-1] += self.isd_slots\n",
        says="isd:rows_total grows with the square of the forwards.",
        tests=(f"{_ENGINE}/test_serve.py::test_rows_are_counted", *_SERVED),
    ),
    Fault(
        "first-tokens-are-counted", "counts", "vllm_idlm/metrics.py",
        old="max(iteration_stats.num_generation_tokens - len(iteration_stats.time_to_first_tokens_iter), 0)",
        new="iteration_stats.num_generation_tokens",
        says="isd:tokens_total counts the tokens of prompts' forwards, and tokens per forward look better.",
        tests=(f"{_ENGINE}/test_serve.py::test_isds_own_metrics", *_SERVED),
    ),
    Fault(
        "acceptance-by-place-shifted", "counts", _STATS,
        old="((drafts > place) & (emitted - 1 > place)).sum()",
        new="((drafts > place) & (emitted > place)).sum()",
        says="Acceptance by place counts the rejected draft as accepted.",
        tests=_COUNTED,
    ),
    Fault(
        "whole-forwards-one-token-short", "counts", _STATS,
        old="        whole = emitted == drafts + 1",
        new="        whole = emitted >= drafts",
        says="Forwards whose last draft was rejected count as accepted in full.",
        tests=_COUNTED,
    ),
    Fault(
        "prompts-are-counted-as-forwards", "counts", "vllm_idlm/v1/proposer.py",
        old="            if tokens and len(self.runner.requests[request].output_token_ids) > len(tokens)",
        new="            if tokens",
        says="A prompt's forward counts as a cold one, and tokens per forward look worse than they are.",
        tests=(f"{_ENGINE}/test_proposer.py", f"{_ENGINE}/test_proposer_forced_drafts.py"),
    ),
    Fault(
        "auto-counts-one-draft-more", "counts", "vllm_idlm/v1/policy.py",
        old="                self.acceptance.observe(row.confidence, len(tokens) - 1)",
        new="                self.acceptance.observe(row.confidence, len(tokens))",
        says="auto takes drafts for better than they are, and chooses rows that do not pay.",
        tests=(
            "tests/unit/v1/test_proposer.py",
            f"{_ENGINE}/test_scheduler.py::test_auto_gives_the_same_text_and_chooses",
        ),
    ),
    Fault(
        "forced-drafts-one-place-late", "counts", "vllm_idlm/forced.py",
        old="[place : place + len(drafts)]",
        new="[place + 1 : place + 1 + len(drafts)]",
        says="idlm doctor --engine calls a sound engine broken.",
        tests=("tests/unit/test_forced.py",),
    ),
]  # fmt: skip
