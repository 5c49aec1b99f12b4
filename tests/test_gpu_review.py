"""What differs on a GPU, as far as its configuration shows it here; and the draft adapter's slot on Model Runner V1."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests import tiny
from tests.engines import engine, isd, proposer
from vllm_idlm import engine_args
from vllm_idlm.engine_args import DRAFT_LORA_ID
from vllm_idlm.settings import SettingsError

pytestmark = pytest.mark.vllm


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


def test_the_draft_adapter_stays(folders):
    """vLLM's Model Runner V1 drops all adapters at the end of its captures (on GPUs)."""
    draft = proposer(engine(folders[0], speculative_config=isd(4, mask_token_id=1, lora=folders[1]), max_num_seqs=3,
                            max_model_len=128, skip_tokenizer_init=True))  # fmt: skip
    runner = draft.runner
    manager = runner.lora_manager._adapter_manager
    runner.maybe_remove_all_loras(runner.lora_config)
    assert runner.list_loras() == set()
    draft.warm_up()
    assert runner.list_loras() == {DRAFT_LORA_ID}
    assert DRAFT_LORA_ID in manager._registered_adapters.pinned_items & manager._active_adapters.pinned_items
