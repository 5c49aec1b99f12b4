"""Configurations of training: what is refused by its field, and overrides."""

from __future__ import annotations

import pytest

from tests.support.training import settings
from vllm_idlm.training import config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss": {"js": 1.0}}, "'js' is unknown; allowed are ce, kl, tv"),
        ({"form": "full", "loss": {"kl": 1.0}}, "the full form trains ce alone"),
        ({"stages": [{"stride": 4, "until": 0.5}]}, "until must rise and end at 1.0"),
        ({"stages": [{"stride": 17, "until": 1.0}]}, "stages.0.stride: 17 is not allowed"),
        ({"loss": {"kl": -1.0}}, "kl has weight -1.0; allowed is 0 or more"),
        ({"depth_weights": [0.0, 0.0]}, "one of them more; they are"),
        ({"adapter": {"targets": ["lm_head"]}}, "lm_head cannot be trained; allowed are q_proj"),
        ({"row_tokens": 64}, "max_tokens 128 is more than row_tokens 64"),
        ({"steps_": 3}, "steps_ is no field"),
    ],
)
def test_wrong_configuration_is_refused_by_field(world, tmp_path, change, words):
    import yaml

    content = settings(world, tmp_path / "run").model_dump(mode="json") | change
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(config.ConfigError, match=words):
        config.load(tmp_path / "c.yaml")


def test_overrides_reach_into_mappings(world, tmp_path):
    import yaml

    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings(world, tmp_path).model_dump(mode="json")))
    made = config.load(tmp_path / "c.yaml", ["steps=7", "adapter.rank=4", "loss={ce: 1}"])
    assert (made.steps, made.adapter.rank, made.loss) == (7, 4, {"ce": 1.0})
    with pytest.raises(config.ConfigError, match="'steps' is no override; write key=value"):
        config.load(tmp_path / "c.yaml", ["steps"])
