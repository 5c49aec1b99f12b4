"""The whole way: train on a synthetic language, write the result in both forms, serve it with vLLM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import engines, songs
from tests.support.training import run, settings
from vllm_idlm.settings import SettingsError
from vllm_idlm.training import config, export, start


def answers(llm) -> list:
    """Greedy answers to beginnings of songs."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": song[: 1 + i % 4]} for i, song in enumerate(songs.songs())]
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    return engines.tokens(llm.generate(prompts, params, use_tqdm=False))


def served(model: Path, **isd) -> tuple[list, dict]:
    """Those with ISD, and its statistics."""
    llm = engines.engine(str(model), skip_tokenizer_init=True, speculative_config=engines.isd(**isd))
    engines.stats(llm)
    return answers(llm), engines.stats(llm)


def plain(model: Path) -> list:
    """Those of plain decoding."""
    return answers(engines.engine(str(model), skip_tokenizer_init=True))


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("base", "steps", "least"),
    [(120, 60, (0.5, 1.5)), pytest.param(250, 120, (0.9, 2.7), marks=pytest.mark.slow)],
    ids=["short", "whole"],
)
def test_gated_adapter_learns_to_draft_and_serves_the_bases_own_text(tmp_path, base, steps, least):
    """base: steps of the base model. least: acceptance of the first draft, held out, and tokens per forward, served."""
    world = songs.write_world(tmp_path, steps=base)
    trained = run(settings(world, tmp_path / "run", steps=steps, eval_every=steps))
    assert trained.train()
    adapter = trained.export()
    record = json.loads((adapter / export.RECORD).read_text())
    assert record["held_out"]["alpha"][0] > least[0]
    want = plain(world / "base")
    got, found = served(world / "base", n=record["stride"], lora=str(adapter))
    assert got == want
    assert found["tpf"] > least[1]


@pytest.mark.slow
@pytest.mark.vllm
def test_full_conversion_learns_to_draft(world, tmp_path):
    trained = run(settings(world, tmp_path / "run", form="full", loss={"ce": 1.0}, lr=2e-3, steps=150))
    assert trained.train()
    model = trained.export()
    assert json.loads((model / export.RECORD).read_text())["held_out"]["alpha"][0] > 0.9
    got, found = served(model, n=4)  # the mask token id is in its config.json
    assert got == plain(model)
    assert found["tpf"] > 2.7


@pytest.mark.vllm
def test_adapter_of_another_base_is_refused_where_it_is_used(tmp_path, smol):
    world = songs.write_world(tmp_path, steps=0)
    trained = run(settings(world, tmp_path / "run", steps=1, rows=1))
    trained.train()
    adapter = trained.export()
    with pytest.raises(SettingsError, match=r"was trained for .*another"):
        engines.engine(smol, speculative_config=engines.isd(lora=str(adapter)))
    with pytest.raises(config.ConfigError, match="was trained for"):
        start.for_evaluation(smol, str(adapter), None, "float32")
    with pytest.raises(config.ConfigError, match="was trained for"):
        run(settings(world, tmp_path / "other", model=smol, adapter={"init": str(adapter)}))
