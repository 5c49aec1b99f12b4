"""From what the user gave to vLLM's configuration: what is filled in, made room for, and refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.support import tiny
from tests.support.engines import isd
from vllm_idlm import engine_args, plugin
from vllm_idlm.settings import SettingsError


def _config(model, **options):
    from vllm import EngineArgs

    return EngineArgs(model, **options).create_engine_config()


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    from tests.support import tiny

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


def test_an_adapter_without_safetensors_is_refused(tiny_model, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="safetensors only"):
        _config(tiny_model, speculative_config={"method": "isd", "mask_token_id": 1, "lora": str(tmp_path)}, **BASE)


def test_an_engines_features_are_those_of_its_settled_configuration(tmp_path):
    """What is required of an engine, as vLLM settles it: the runner, Ray, the adapter, groups of masks."""
    from vllm import EngineArgs

    from tests.support.engines import isd
    from tests.support.tiny import write_adapter, write_tiny
    from vllm_idlm.engine_args import features

    plugin.register()
    model, adapter = write_tiny(tmp_path / "model"), write_adapter(tmp_path / "adapter", tmp_path / "model")

    def of(**settings):
        asked = isd(3, mask_token_id=1, **settings)
        args = EngineArgs(str(model), dtype="float32", speculative_config=asked, skip_tokenizer_init=True)
        return features(args.create_engine_config())

    assert of() == {"v1", "cpu"}
    assert of(lora=str(adapter), coverage="auto") == {"v1", "cpu", "lora", "groups", "auto"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("gpu_review")
    model = tiny.write_tiny(root / "model", vocab=48)
    return str(model), str(tiny.write_adapter(root / "draft", model, scale=0.5))


@pytest.fixture
def config(folders):
    """The VllmConfig of an engine with or without the adapter, by its dtype."""
    from vllm import EngineArgs

    def made(dtype, gated):
        asked = isd(4, mask_token_id=1, **({"lora": folders[1]} if gated else {}))
        args = EngineArgs(folders[0], dtype=dtype, speculative_config=asked, skip_tokenizer_init=True, max_num_seqs=3)
        return args.create_engine_config()

    return made


@pytest.mark.parametrize(
    ("dtype", "gated", "cuda", "refused"),
    [
        ("float32", True, True, True),
        ("float32", True, False, False),
        ("float32", False, True, False),
        ("bfloat16", True, True, False),
        ("float16", True, True, False),
    ],
)
def test_float32_with_an_adapter_on_cuda(config, folders, monkeypatch, dtype, gated, cuda, refused):
    """vLLM's LoRA kernels there assert half precision, deep in the engine's start: said at once, with the way out."""
    found = config(dtype, gated)
    platform = SimpleNamespace(is_cuda_alike=lambda: cuda, device_name="cuda")
    monkeypatch.setattr("vllm.platforms.current_platform", platform)
    if not refused:
        engine_args.refuse_float32_adapter(found)
        return
    with pytest.raises(SettingsError) as error:
        engine_args.refuse_float32_adapter(found)
    for word in ('"lora"', folders[1], "dtype='float32'", "cuda", "bfloat16 and float16", "leave the adapter out"):
        assert word in str(error.value)


def test_vllms_lora_kernels_still_assert_half_precision():
    """Once they do not, the refusal can go."""
    import inspect

    from vllm.lora.ops.triton_ops import lora_shrink_op

    assert "assert inputs.dtype in [torch.float16, torch.bfloat16]" in inspect.getsource(lora_shrink_op)
