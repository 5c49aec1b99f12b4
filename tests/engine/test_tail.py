"""Where extra groups of mask slots cannot run, an engine that asked for them is refused, and `auto` leaves them out."""

from __future__ import annotations

import pytest

from tests.engine.test_proposer import folders  # noqa: F401
from tests.support.engines import engine, isd, proposer, stats
from vllm_idlm import tail
from vllm_idlm.settings import SettingsError

pytestmark = pytest.mark.vllm


def test_auto_leaves_them_out_where_they_cannot_run_and_others_are_refused(folders, monkeypatch):  # noqa: F811
    """As if the model's attention had sliding windows: the engine starts and decodes, with the causal row alone."""
    from vllm import SamplingParams, TokensPrompt

    def refuse(name, layer):
        raise SettingsError("a sliding window")

    monkeypatch.setattr(tail, "check", refuse)
    options = {"skip_tokenizer_init": True, "max_model_len": 64, "seed": 3}
    with pytest.raises(SettingsError, match="a sliding window"):
        engine(folders[0], speculative_config=isd(3, mask_token_id=1, coverage="all"), **options)
    llm = engine(folders[0], speculative_config=isd(3, mask_token_id=1, coverage="auto"), **options)
    assert proposer(llm).settings.coverage == "last"
    assert proposer(llm).tail is None
    stats(llm)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
    llm.generate([TokensPrompt(prompt_token_ids=[3, 7, 11])], params, use_tqdm=False)
    assert sum(stats(llm)["drafted_per_position"]) > 0
