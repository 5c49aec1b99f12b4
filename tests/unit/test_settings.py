"""Settings: what is taken, what is refused (naming setting, value, what is allowed, the fix), what is found."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from vllm_idlm.settings import ISDSettings, SettingsError, complete, parse, wants_isd


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"n": 1}, ['"n"', "1 is not allowed", "greater than or equal to 2"]),
        ({"n": 17}, ['"n"', "17", "less than or equal to 16"]),
        ({"n": "4"}, ['"n"', "'4'", "integer"]),
        ({"n": 4.5}, ['"n"', "4.5"]),
        ({"stride": 4}, ['"stride" (4)', "allowed are", "mask_token_id"]),
        ({"mask_token": 3}, ['did you mean "mask_token_id"']),
        ({"draft_sampling": "argmax"}, ['"draft_sampling"', "'argmax'", "'probabilistic' or 'greedy'"]),
        ({"verify": "tree"}, ['"verify"', "'standard'", "'block'"]),
        ({"verify": "block", "lossy_alpha": 0.8}, ['"lossy_alpha"', "can be relaxed"]),
        ({"lossy_alpha": 1.5}, ['"lossy_alpha"', "less than or equal to 1"]),
        ({"coverage": "most"}, ['"coverage"']),
        ({"coverage": [0, 3]}, ['"coverage"', "from 0 to n - 2 = 2"]),
        ({"coverage": [1, 1]}, ['"coverage"', "different numbers"]),
        ({"mask_token_id": -1}, ['"mask_token_id"', "-1"]),
        ({"model": "x"}, ['"lora"']),
        ({"num_speculative_tokens": 3}, ['say "n"']),
        ({"lora": 3}, ['"lora"', "string"]),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused_with_the_fix(given, words):
    with pytest.raises(SettingsError) as error:
        parse({"method": "isd", **given})
    for word in words:
        assert word in str(error.value)


def test_what_the_user_gave_stands_over_the_zoo():
    zoo = {"n": 8, "mask_token_id": 5, "lora": "/adapter"}
    assert parse({"method": "isd"}, zoo) == ISDSettings(n=8, mask_token_id=5, lora="/adapter")
    assert parse({"method": "isd", "n": 2, "lora": None}, zoo) == ISDSettings(n=2, mask_token_id=5, lora=None)
    assert parse({"method": "isd", "mask-token-id": 7}).mask_token_id == 7  # as vLLM's CLI writes keys


def test_the_mask_token_id_comes_from_settings_then_adapter_then_checkpoint(tmp_path):
    config = SimpleNamespace(mask_token_id=9)
    (tmp_path / "isd.json").write_text(json.dumps({"stride": 4, "mask_token_id": 16}))
    lora = str(tmp_path)
    assert complete(ISDSettings(mask_token_id=3, lora=lora), config, 100).mask_token_id == 3
    assert complete(ISDSettings(lora=lora), config, 100).mask_token_id == 16
    assert complete(ISDSettings(), config, 100).mask_token_id == 9
    with pytest.raises(SettingsError, match="151669"):
        complete(ISDSettings(), SimpleNamespace(), 100)
    with pytest.raises(SettingsError, match=r"outside the vocabulary: allowed are 0\.\.99"):
        complete(ISDSettings(mask_token_id=100), config, 100)


@pytest.mark.parametrize(
    ("coverage", "n", "extra", "slots"),
    [
        ("last", 4, 0, 6),
        ("all", 4, 3, 15),
        ([2, 0], 4, 2, 12),
        ("auto", 4, 3, 15),
        ("auto", 8, 2, 28),
        ("auto", 16, 0, 30),
    ],
)
def test_room_for_extra_groups(coverage, n, extra, slots):
    found = parse({"method": "isd", "n": n, "coverage": coverage})
    assert (found.extra, found.slots) == (extra, slots)
    assert len(found.groups) >= extra


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        ([[2, None, 4]], "must begin at 1"),
        ([[1, 8, 4], [10, None, 2]], "must begin at 9"),
        ([[1, 8, 4]], "null"),
        ([[1, 8, 5], [9, None, 1]], "between 1 and n=4"),
        ([[1, None, 4], [9, None, 1]], "comes last"),
        ([[1, 8]], r"\[first, last, stride\]"),
    ],
)
def test_schedule_is_checked(schedule, says):
    with pytest.raises(SettingsError, match=says):
        parse({"method": "isd", "n": 4, "schedule": schedule})


def test_stride_by_schedule():
    found = parse({"method": "isd", "n": 4, "schedule": [[1, 16, 4], [17, 64, 3], [65, None, 1]]})
    assert [found.stride(b) for b in (1, 16, 17, 64, 65, 5000)] == [4, 4, 3, 3, 1, 1]
    assert parse({"method": "isd", "n": 4}).stride(300) == 4


def test_a_request_may_opt_out():
    from vllm import SamplingParams

    assert wants_isd(SamplingParams())
    assert wants_isd(SamplingParams(extra_args={"isd": "on"}))
    assert not wants_isd(SamplingParams(extra_args={"isd": "off"}))
    assert not wants_isd(SamplingParams(extra_args={"isd": False}))
    with pytest.raises(ValueError, match="allowed are true"):
        wants_isd(SamplingParams(extra_args={"isd": "perhaps"}))
