"""The kernel of products on CPUs in engines: each has what it asked for, and the same text."""

from __future__ import annotations

import pytest
from vllm_idlm.kernels import linear

from tests.support import tiny
from tests.support.engines import engine, isd, tokens
from vllm_idlm.settings import of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny.write_tiny(tmp_path_factory.mktemp("linear") / "model", vocab=48))


@pytest.mark.vllm
@pytest.mark.parametrize("asked", ["rows", "vllm"])
def test_an_engine_has_what_it_asked_for_and_the_same_text(folder, asked):
    """Every layer but what the kernel does not take; plain engines keep vLLM's."""
    from vllm import SamplingParams, TokensPrompt

    prompts = [TokensPrompt(prompt_token_ids=p) for p in ([3, 7, 11, 2], [5, 5, 9], [13])]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
    options = {"skip_tokenizer_init": True, "max_model_len": 64}
    plain = engine(folder, **options)
    llm = engine(folder, speculative_config=isd(4, mask_token_id=1, coverage="all", cpu_linear=asked), **options)
    assert of(llm.llm_engine.vllm_config).cpu_linear == asked
    assert ours(llm) == (asked == "rows")
    assert not ours(plain)
    assert tokens(llm.generate(prompts, params, use_tqdm=False)) == tokens(
        plain.generate(prompts, params, use_tqdm=False)
    )


def ours(llm):
    """Whether the products are our kernel's, of all layers alike."""
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    found = {layer.cpu_linear is linear.linear for layer in model.modules() if hasattr(layer, "cpu_linear")}
    assert len(found) == 1
    return found.pop()
