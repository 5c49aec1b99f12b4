"""The compiled path, which is what users run: R-ISD under torch.compile equals plain decoding, and drafts for real."""

from __future__ import annotations

import pytest

from tests.engines import engine, isd, stats, tokens

pytestmark = pytest.mark.vllm


def test_compiled_gated_decoding_equals_plain(smol, adapter):
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    chats = [[{"role": "user", "content": p}] for p in ("Count to ten.", "What is rain?", "Tell me about Paris.")]
    want = tokens(engine(smol).chat(chats, params, use_tqdm=False))
    llm = engine(smol, speculative_config=isd(lora=adapter, coverage="all"), enforce_eager=False)
    assert llm.llm_engine.vllm_config.compilation_config.mode.name != "NONE"
    stats(llm)
    assert tokens(llm.chat(chats, params, use_tqdm=False)) == want
    assert sum(stats(llm)["accepted_per_position"]) > 10, "the draft adapter was lost on the way through profiling"
