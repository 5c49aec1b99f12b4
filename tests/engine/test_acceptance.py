"""The forecast of serving against what greedy serving takes on a real engine."""

from __future__ import annotations

import pytest


@pytest.mark.vllm
@pytest.mark.parametrize("coverage", [pytest.param("last", marks=pytest.mark.slow), "all"])
def test_forecast_is_what_greedy_serving_gives(smol, adapter, coverage):
    """The chain over plain decoding's answers counts the very forwards that serving takes (float32, no ties)."""
    from vllm import SamplingParams

    from tests.support import engines
    from vllm_idlm.training import acceptance, start
    from vllm_idlm.training.layout import Sample

    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    chats = [[{"role": "user", "content": f"Count from {i} to {i + 9}."}] for i in range(4)]
    outputs = engines.engine(smol).chat(chats, params, use_tqdm=False)
    samples = [Sample(list(o.prompt_token_ids), list(o.outputs[0].token_ids)) for o in outputs]
    model, _, mask = start.for_evaluation(smol, adapter, None, "float32")
    measured = list(acceptance.rates(model, samples, 3, mask, (0.0,)))
    llm = engines.engine(smol, speculative_config=engines.isd(4, lora=adapter, coverage=coverage))
    engines.stats(llm)
    assert engines.tokens(llm.chat(chats, params, use_tqdm=False)) == engines.tokens(outputs)
    served = engines.stats(llm)
    assert acceptance.forecast(measured, 0.0, 3, coverage == "all").forwards == pytest.approx(
        served["forwards"], rel=0.05
    )
