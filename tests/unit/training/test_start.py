"""Before a run of training: samples that cannot be trained on are refused."""

from __future__ import annotations

import json

import pytest

from tests.support.training import run, settings
from vllm_idlm.training import config


def test_samples_without_answers_or_of_another_model_are_refused(world, tmp_path):
    (tmp_path / "short.jsonl").write_text(json.dumps({"prompt_ids": [2], "answer_ids": [3]}) + "\n")
    with pytest.raises(config.ConfigError, match="none of 1 samples has an answer of 3 tokens or more"):
        run(settings(world, tmp_path / "run", data=[str(tmp_path / "short.jsonl")]))
    (tmp_path / "other.jsonl").write_text(json.dumps({"prompt_ids": [2], "answer_ids": [3, 99, 4, 5]}) + "\n")
    with pytest.raises(config.ConfigError, match="holds token id 99, the model's vocabulary ends at 63"):
        run(settings(world, tmp_path / "run", data=[str(tmp_path / "other.jsonl")]))
