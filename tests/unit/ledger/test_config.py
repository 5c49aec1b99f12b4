"""Patches of vLLM's configuration and requests: structured output where its patch does not fit."""

from __future__ import annotations

import types

import pytest

from vllm_idlm import patching
from vllm_idlm.patching import live


def test_structured_output_is_refused_alone_where_its_patch_does_not_fit(monkeypatch):
    """The engine runs; a request that would be decoded in another distribution is a bad request."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import StructuredOutputsParams

    from vllm_idlm.ledger.config import _validate_params

    engine = types.SimpleNamespace(vllm_config=types.SimpleNamespace(additional_config={"isd": {}}))
    grammar = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a+"))
    assert _validate_params(lambda self, params: "passed", engine, grammar) == "passed"
    monkeypatch.setattr(live, "_MISFITS", {"grammar-sees-drafts": "some.place: changed"})
    patching.require({"v1", "v2", "lora", "auto", "groups"})
    assert _validate_params(lambda self, params: "passed", engine, SamplingParams()) == "passed"
    with pytest.raises(VLLMValidationError, match="send such requests without structured output"):
        _validate_params(lambda self, params: "passed", engine, grammar)
