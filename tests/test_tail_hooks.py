"""Where extra groups of mask slots cannot run: refused by name where they were asked for, left out under auto."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.engines import engine, isd, proposer, stats
from tests.test_forwards import folders  # noqa: F401
from vllm_idlm import tail
from vllm_idlm.settings import SettingsError

pytestmark = pytest.mark.vllm


def layer(**changes):
    """A layer of vLLM's class Attention, with what `check` reads, and the changes in its `impl`."""
    from vllm.model_executor.layers.attention import Attention

    made = object.__new__(Attention)
    plain = {"sliding_window": -1, "alibi_slopes": None, "logits_soft_cap": 0, "sinks": None, "kv_cache_dtype": "auto"}
    object.__setattr__(made, "__dict__", {"impl": SimpleNamespace(**{**plain, **changes})})
    return made


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sliding_window": 4096}, "a sliding window"),
        ({"alibi_slopes": [1.0]}, "ALiBi"),
        ({"logits_soft_cap": 30.0}, "a soft cap"),
        ({"sinks": object()}, "attention sinks"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype 'fp8'"),
        ({"kv_sharing_target_layer_name": "layers.0"}, "shared between layers"),
    ],
)
def test_attention_with_more_to_it_is_refused(changes, says):
    tail.check("layers.1", layer())
    tail.check("layers.1", layer(sliding_window=(-1, -1)))
    with pytest.raises(SettingsError, match=says) as refused:
        tail.check("layers.1", layer(**changes))
    assert 'allowed is "last"' in str(refused.value)
    assert "layers.1" in str(refused.value)


def test_another_kind_of_layer_is_refused():
    with pytest.raises(SettingsError, match="attention of class SimpleNamespace"):
        tail.check("layers.1", SimpleNamespace(impl=layer().impl))


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
