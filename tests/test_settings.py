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


def _config(model, **options):
    from vllm import EngineArgs

    return EngineArgs(model, **options).create_engine_config()


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    from tests import tiny

    return str(tiny.write_tiny(tmp_path_factory.mktemp("settings") / "model"))


BASE = {"skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 128}


def test_the_zoo_name_brings_model_mask_adapter_and_dtype(smol, adapter):
    found = _config("smollm2-135m-risd", speculative_config={"method": "isd"}, max_model_len=256)
    assert found.model_config.model == smol
    assert found.model_config.served_model_name == "smollm2-135m-risd"
    isd = found.additional_config["isd"]
    assert (isd["n"], isd["mask_token_id"], isd["lora"]) == (4, 16, adapter)
    assert found.speculative_config.num_speculative_tokens == 15
    assert found.lora_config.max_loras == 1
    assert str(found.model_config.dtype) == "torch.bfloat16"
    assert str(_config("smollm2-135m-risd", dtype="float32").model_config.dtype) == "torch.float32"


def test_without_isd_the_configuration_is_vllms_own(tiny_model):
    found = _config(tiny_model, **BASE)
    assert found.speculative_config is None
    assert found.lora_config is None
    assert found.additional_config == {}
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    assert _config(tiny_model, speculative_config=ngram, **BASE).speculative_config.method == "ngram"
    assert not hasattr(found.parallel_config, "isd")
    assert found.parallel_config.worker_extension_cls == ""


def test_the_split_flags_of_the_cli(tiny_model):
    from vllm import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    words = ["--model", tiny_model, "--spec-method", "isd", "--spec-tokens", "2", "--skip-tokenizer-init"]
    extra = '{"mask_token_id": 1}'
    args = EngineArgs.from_cli_args(parser.parse_args([*words, "--speculative-config", extra]))
    isd = args.create_engine_config().additional_config["isd"]
    assert (isd["n"], isd["mask_token_id"]) == (3, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline"),
        ({"speculative_config": {"method": "isd", "n": 40}}, '"n": 40'),
        ({"speculative_config": {"method": "isd"}}, "mask_token_id"),
        ({"speculative_config": {"method": "isd", "mask_token_id": 48}}, r"0\.\.47"),
        ({"speculative_config": {"method": "isd", "mask_token_id": 1, "lora": "/nowhere/adapter"}}, "/nowhere/adapter"),
        ({"spec_model": "x", "spec_method": "isd"}, "--spec-model"),
        ({"spec_tokens": 3, "speculative_config": {"method": "isd", "n": 4}}, "give one"),
    ],
    ids=["pp", "n", "no-mask", "mask-outside", "no-adapter", "spec-model", "twice"],
)
def test_refused_before_anything_is_loaded(tiny_model, options, words):
    config = {} if "spec_method" in options else {"speculative_config": {"method": "isd", "mask_token_id": 1}}
    with pytest.raises(ValueError, match=words):
        _config(tiny_model, **{**BASE, **config, **options})


def test_the_default_budget_holds_every_row(smol):
    found = _config("smollm2-135m-risd", speculative_config={"method": "isd", "n": 16}, max_num_seqs=256)
    assert 256 * 31 <= found.scheduler_config.max_num_batched_tokens < 256 * 33  # auto makes room for 32 slots
    limits = {"max_num_seqs": 16, "max_num_batched_tokens": 64}
    with pytest.raises(ValueError, match=r"max_num_batched_tokens=64 .* at least 112"):
        _config("smollm2-135m-risd", speculative_config={"method": "isd", "n": 4}, **limits)
    limits["max_num_batched_tokens"] = 200
    asked = {"method": "isd", "n": 4, "coverage": "all"}
    with pytest.raises(ValueError, match=r"max_num_batched_tokens=200 .* at least 256"):
        _config("smollm2-135m-risd", speculative_config=asked, **limits)
    found = _config("smollm2-135m-risd", speculative_config={"method": "isd"}, **limits)
    assert found.additional_config["isd"]["coverage"] == "last"  # all that the room given allows
    assert found.speculative_config.num_speculative_tokens == 6


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


def test_an_adapter_without_safetensors_is_refused(tiny_model, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="safetensors only"):
        _config(tiny_model, speculative_config={"method": "isd", "mask_token_id": 1, "lora": str(tmp_path)}, **BASE)


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
