"""Requests that use every sampling option: (name, prompt, options). All are greedy or otherwise deterministic."""

from __future__ import annotations

from typing import Any

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"type": "string"}},
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("plain", "Write a haiku about the sea.", {"max_tokens": 40}),
    ("max-tokens-1", "What is the capital of France?", {"max_tokens": 1}),
    ("max-tokens-2", "What is the capital of France?", {"max_tokens": 2}),
    ("max-tokens-6", "Count from one to ten.", {"max_tokens": 6}),
    ("natural-stop", "Say only: yes.", {"max_tokens": 64}),
    ("stop-string", "Count from one to ten.", {"max_tokens": 60, "stop": ["5", "seven"]}),
    (
        "stop-string-kept",
        "Count from one to ten.",
        {"max_tokens": 60, "stop": ["4"], "include_stop_str_in_output": True},
    ),
    ("stop-token", "List three fruits.", {"max_tokens": 60, "stop_token_ids": [198]}),
    ("ignore-eos", "Say only: yes.", {"max_tokens": 40, "ignore_eos": True}),
    ("min-tokens", "Say only: yes.", {"max_tokens": 40, "min_tokens": 25}),
    ("min-tokens-stop", "Count from one to ten.", {"max_tokens": 40, "min_tokens": 9, "stop_token_ids": [198]}),
    ("bad-words", "What is the capital of France?", {"max_tokens": 24, "bad_words": ["Paris", " capital of", "The"]}),
    ("allowed-ids", "Tell me a story.", {"max_tokens": 24, "allowed_token_ids": list(range(400, 1400))}),
    ("presence", "Name some animals.", {"max_tokens": 32, "presence_penalty": 1.2}),
    ("frequency", "Name some animals.", {"max_tokens": 32, "frequency_penalty": 0.9}),
    ("repetition", "Name some animals.", {"max_tokens": 32, "repetition_penalty": 1.4}),
    ("logit-bias", "What is the capital of France?", {"max_tokens": 24, "logit_bias": {1000: 12.0, 504: -50.0}}),
    (
        "bias-and-penalties",
        "Name some animals.",
        {"max_tokens": 24, "logit_bias": {300: 9.0}, "repetition_penalty": 1.5, "min_tokens": 12, "bad_words": ["cat"]},
    ),
    ("min-p-greedy", "Name a colour.", {"max_tokens": 16, "min_p": 0.2}),
    ("logprobs", "What is the capital of France?", {"max_tokens": 16, "logprobs": 4}),
    ("logprobs-0", "What is the capital of Italy?", {"max_tokens": 12, "logprobs": 0}),
    ("prompt-logprobs", "What is the capital of Spain?", {"max_tokens": 8, "prompt_logprobs": 2}),
    ("top-k-1", "Explain gravity.", {"max_tokens": 24, "temperature": 1.0, "top_k": 1}),
    ("seeded-top-k-1", "Explain gravity.", {"max_tokens": 24, "temperature": 1.3, "top_k": 1, "seed": 7}),
    ("several-answers", "Explain light.", {"max_tokens": 16, "temperature": 1.0, "top_k": 1, "n": 3}),
    ("mask-emitted", "Say anything.", {"max_tokens": 12, "logit_bias": {16: 100.0}}),
    ("mask-sometimes", "Tell me about birds.", {"max_tokens": 32, "logit_bias": {16: 17.0}, "frequency_penalty": 1.5}),
    ("json", "Describe a person as JSON with name, age, city.", {"max_tokens": 48, "json": SCHEMA}),
    ("choice", "Is the sky blue? Answer yes or no.", {"max_tokens": 8, "choice": ["definitely yes", "definitely no"]}),
    ("regex", "Give a date.", {"max_tokens": 16, "regex": r"[0-9]{4}-[0-9]{2}-[0-9]{2}"}),
]


def sampling(options: dict[str, Any]) -> Any:
    """vLLM's SamplingParams for a case."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    options = {"temperature": 0.0, **options}
    grammar = {key: options.pop(key) for key in ("json", "choice", "regex") if key in options}
    if grammar:
        options["structured_outputs"] = StructuredOutputsParams(**grammar)
    return SamplingParams(**options)
