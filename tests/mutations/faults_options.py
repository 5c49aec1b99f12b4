"""Faults in how a request's sampling options reach each verified row."""

from tests.mutations.fault import Fault

_OPTIONS, _SAMPLER, _V2 = "vllm_idlm/v1/options.py", "vllm_idlm/v1/sampler.py", "vllm_idlm/v2/sampler.py"
_CASE = "tests/engine/test_options.py::test_option_equals_plain"
_CASES = "tests/engine/test_options.py"
_SAMPLED = "tests/engine/test_sampler.py"
_RANDOM = "tests/engine/test_options_at_random.py"
_PENALTIES = (
    f"{_SAMPLED}::test_sampled_equals_plain[penalties-all-block]",
    f"{_CASE}[presence-risd-all]",
    f"{_CASE}[frequency-risd-all]",
    _CASES,
    "tests/engine/test_proposer_forced_drafts.py::test_right_drafts_with_options",
    _RANDOM,
)
_FILTERS = f"{_SAMPLED}::test_sampled_equals_plain[filters-all]"
_BESIDE = (
    "tests/interpreted/test_speculator.py::test_options_beside_each_other",
    "tests/interpreted/test_sampler_at_random.py",
)

FAULTS = [
    Fault(
        "penalties-without-the-drafts-in-front", "options", _OPTIONS,
        old="        output_token_ids=rows.prefixes(sampling.output_token_ids),",
        new="        output_token_ids=[sampling.output_token_ids[i] for i in rows.owner],",
        says="Penalties do not count the drafts that were accepted in the same forward.",
        tests=_PENALTIES,
    ),
    Fault(
        "penalties-with-the-draft-itself", "options", _OPTIONS,
        old="        return [[*outputs[i], *self.drafts[i][:j]]",
        new="        return [[*outputs[i], *self.drafts[i][: j + 1]]",
        says="A draft is penalised as if it had been emitted already, and is rejected too often.",
        tests=_PENALTIES,
    ),
    Fault(
        "bias-on-the-first-row-only", "options", _OPTIONS,
        old="    new.biases = {row: bias for request, bias in found.biases.items() for row in rows.of(request)}",
        new="    new.biases = {rows.of(request)[0]: bias for request, bias in found.biases.items()}",
        says="logit_bias holds for one token a forward.",
        tests=(*_PENALTIES[:1], f"{_CASE}[logit-bias-risd-all]", _CASES, _RANDOM),
    ),
    Fault(
        "bad-words-on-the-first-row-only", "options", _OPTIONS,
        old="request, words in sampling.bad_words_token_ids.items() for row in rows.of(request)",
        new="request, words in sampling.bad_words_token_ids.items() for row in rows.of(request)[:1]",
        says="A bad word comes out as an accepted draft.",
        tests=(f"{_CASE}[bad-words-risd-all]", _CASES, _RANDOM),
    ),
    Fault(
        "allowed-ids-ignored", "options", _OPTIONS,
        old="        allowed_token_ids_mask=_pick(sampling.allowed_token_ids_mask, pick),",
        new="        allowed_token_ids_mask=None,",
        says="Tokens outside of allowed_token_ids come out.",
        tests=(f"{_CASE}[allowed-ids-risd-all]", _CASES, _RANDOM),
    ),
    Fault(
        "min-tokens-by-the-first-row", "options", _OPTIONS,
        old="            if len(output) + place < least:",
        new="            if len(output) < least:",
        says="A stop token is held back although min_tokens is reached by the drafts in front.",
        tests=(f"{_CASE}[min-tokens-stop-risd-all]", _CASES, _RANDOM),
    ),
    Fault(
        "min-tokens-ignored", "options", _OPTIONS,
        old="        return bool(processor.min_toks)",
        new="        return False",
        says="An answer ends before it has min_tokens tokens.",
        tests=(f"{_CASE}[min-tokens-risd-all]", _CASES, _RANDOM),
    ),
    Fault(
        "min-p-ignored", "options", _SAMPLER,
        old="        logits = over_rows(processor, layout).apply(logits)",
        new="        pass",
        says="min_p does nothing for sampled requests.",
        tests=(_FILTERS, _SAMPLED),
    ),
    Fault(
        "top-p-ignored", "options", _SAMPLER,
        old="    return apply_top_k_top_p(logits, top_k, top_p)",
        new="    return apply_top_k_top_p(logits, top_k, None)",
        says="top_p bounds drafts alone: what is emitted has tokens from outside of it.",
        tests=(_FILTERS, _SAMPLED),
    ),
    Fault(
        "top-k-ignored", "options", _SAMPLER,
        old="    return apply_top_k_top_p(logits, top_k, top_p)",
        new="    return apply_top_k_top_p(logits, None, top_p)",
        says="top_k bounds drafts alone: what is emitted has tokens from outside of it.",
        tests=(f"{_CASE}[top-k-1-risd-all]", _CASES, _SAMPLED),
    ),
    Fault(
        "logprobs-of-the-row-behind", "options", _SAMPLER,
        old="        places = starts[:, None] + np.minimum(np.arange(width), counts[:, None] - 1)",
        new="        places = starts[:, None] + np.minimum(np.arange(width) + 1, counts[:, None] - 1)",
        says="Log-probabilities are the next token's.",
        tests=(f"{_CASE}[logprobs-risd-all]", _CASES, _RANDOM),
    ),
    Fault(
        "logprobs-of-processed-logits", "options", _SAMPLER,
        old='        raw = anchors.clone() if self._reports(sampling, "raw") else None',
        new='        raw = anchors if self._reports(sampling, "raw") else None',
        says="Log-probabilities are those behind penalties and temperature although raw ones are the mode.",
        tests=(
            "tests/engine/test_proposer_forced_drafts.py::test_right_drafts_with_options",
            _CASES,
            _RANDOM,
        ),
    ),
    Fault(
        "thinking-budget-one-token-late", "options", "vllm_idlm/v1/thinking.py",
        old="                _advance(holder, state, [*output, *rows.drafts[request][:place]])",
        new="                _advance(holder, state, [*output, *rows.drafts[request][: place - 1]])",
        says="A thinking budget ends thinking late where drafts are accepted.",
        tests=("tests/unit/v1/test_thinking.py",),
    ),
    Fault(
        "thinking-budget-forgets-accepted-drafts", "options", "vllm_idlm/v1/thinking.py",
        old='    for length in range(kept["length"] + 1, len(output) + 1):',
        new="    for length in range(len(output), len(output) + 1):",
        says="A thinking budget counts one token a forward, however many were accepted.",
        tests=("tests/unit/v1/test_thinking.py",),
    ),
    Fault(
        "v2-options-ignored", "options", _V2,
        old="                self.general[req_idx] |= bool(needs_processing)\n",
        new="",
        says="Penalties, biases, bad words and allowed ids do nothing on Model Runner V2.",
        tests=_BESIDE,
    ),
    Fault(
        "v2-truncation-ignored", "options", _V2,
        old="            self.general[req_idx] = params.temperature != 0.0 and truncates",
        new="            self.general[req_idx] = False",
        says="top_k, top_p and min_p do nothing on Model Runner V2.",
        tests=_BESIDE,
    ),
    Fault(
        "v2-penalties-without-the-drafts-in-front", "options", _V2,
        old="            async_tensor_h2d(own.places, device=device, dtype=torch.int32),",
        new="            async_tensor_h2d(np.zeros_like(own.places), device=device, dtype=torch.int32),",
        says="Penalties do not count the drafts that were accepted in the same forward, on Model Runner V2.",
        tests=_BESIDE,
    ),
    Fault(
        "v2-options-of-the-neighbour", "options", _V2,
        old="            async_tensor_h2d(np.repeat(slots, own.counts), device=device, dtype=torch.int64),",
        new="            async_tensor_h2d(np.repeat(np.roll(slots, 1), own.counts), device=device, dtype=torch.int64),",
        says="Each request is answered with its neighbour's options on Model Runner V2.",
        tests=_BESIDE,
    ),
    Fault(
        "v2-logprobs-of-the-row-before", "options", _V2,
        old="            processed = rows.logits[async_tensor_h2d(verified.rows, device=rows.logits.device)]",
        new="            processed = rows.logits[torch.from_numpy((verified.rows - 1).clip(0)).to(rows.logits.device)]",
        says="Log-probabilities are those of the token before, on Model Runner V2.",
        tests=_BESIDE,
    ),
]  # fmt: skip
