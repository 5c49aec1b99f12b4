"""The compiled path, which is what users run: R-ISD under torch.compile equals plain decoding, and drafts for real."""

from __future__ import annotations

import pytest
import torch

from tests.support import tiny
from tests.support.engines import engine, isd, proposer, stats, tokens

pytestmark = pytest.mark.vllm


@pytest.mark.slow
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


@pytest.mark.parametrize("aot", ["1", pytest.param("0", marks=pytest.mark.slow)], ids=["cached graph", "bytecode"])
def test_steps_without_masks_take_the_model_without_lora(tmp_path, monkeypatch, aot):
    """By a schedule: three requests decode plainly, two and one from masks; each graph serves its own steps."""
    from vllm import SamplingParams, TokensPrompt

    monkeypatch.setenv("VLLM_USE_AOT_COMPILE", aot)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    model = tiny.write_tiny(tmp_path / "model", vocab=48)
    lora = str(tiny.write_adapter(tmp_path / "draft", model, scale=0.5))
    prompts = [TokensPrompt(prompt_token_ids=p) for p in ([3, 7, 11, 2], [5, 5, 9], [13])]
    params = [SamplingParams(temperature=0, max_tokens=8 + 16 * i, ignore_eos=True, detokenize=False) for i in range(3)]
    options = {"skip_tokenizer_init": True, "max_model_len": 128}
    want = tokens(engine(str(model), **options).generate(prompts, params, use_tqdm=False))
    config = isd(4, mask_token_id=1, lora=lora, schedule=[[1, 2, 4], [3, None, 1]])
    eager = engine(str(model), speculative_config=config, **options)
    stats(eager)
    assert tokens(eager.generate(prompts, params, use_tqdm=False)) == want
    llm = engine(str(model), speculative_config=config, enforce_eager=False, **options)
    graphs, used = proposer(llm).base_graph, []
    choose = graphs.use
    monkeypatch.setattr(graphs, "use", lambda base: (used.append(base), choose(base)))
    stats(llm)
    assert tokens(llm.generate(prompts, params, use_tqdm=False)) == want
    found, wanted = stats(llm), stats(eager)
    assert sum(found["accepted_per_position"]) > 0
    for count in ("forwards", "drafted_per_position", "accepted_per_position"):
        assert found[count] == wanted[count], "the draft adapter was lost on the way through profiling"
    assert used[1:5] == [True] * 4, "three requests did not decode plainly"
    assert used.count(False) > 8, "one request did not decode from masks"
    calls = {base: _lora_calls(llm, base) for base in (True, False)}
    assert calls == {True: 0, False: 4 * 2}, "four LoRA updates in each of two layers"


def test_a_users_output_head_is_not_left_behind(tmp_path, monkeypatch):
    """All steps are plain decoding, by the graph without LoRA where no request has an adapter; the one that has, on the
    output head, which is in no graph, ends while the other goes on."""
    from vllm import SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    model = tiny.write_tiny(tmp_path / "model", vocab=48)
    lora = str(tiny.write_adapter(tmp_path / "draft", model, scale=0.5))
    head = str(tiny.write_adapter(tmp_path / "head", model, seed=5, scale=4.0, head=True))
    prompts = [TokensPrompt(prompt_token_ids=p) for p in ([3, 7, 11, 2], [5, 5, 9])]
    params = [SamplingParams(temperature=0, max_tokens=m, ignore_eos=True, detokenize=False) for m in (6, 24)]
    options = {"skip_tokenizer_init": True, "max_model_len": 64}
    alone = engine(str(model), **options).generate(prompts, params, use_tqdm=False)
    config = isd(4, mask_token_id=1, lora=lora, schedule=[[1, None, 1]])
    room = {"enable_lora": True, "max_loras": 1, "max_lora_rank": 8}
    llm = engine(str(model), speculative_config=config, enforce_eager=False, **room, **options)
    loras = [LoRARequest("head", 1, head), None]
    found = tokens(llm.generate(prompts, params, lora_request=loras, use_tqdm=False))
    assert found[1] == tokens(alone)[1]
    assert found[0] != tokens(alone)[0], "the user's adapter changes nothing"


def _lora_calls(llm, base: bool) -> int:
    """How often one forward by one of the graphs calls the LoRA update."""
    from torch.profiler import profile
    from vllm.forward_context import set_forward_context

    isd = proposer(llm)
    isd.base_graph.use(base)
    rows = {"input_ids": torch.tensor([3, 5]), "positions": torch.arange(2)}
    with torch.inference_mode(), set_forward_context(None, isd.runner.vllm_config, num_tokens=2), profile() as seen:
        isd.runner.model(**rows, intermediate_tensors=None, inputs_embeds=None)
    return sum(event.count for event in seen.key_averages() if "add_lora" in event.key)
