"""A checkpoint in the format of the published I-DLM ones loads without remote code and computes what Qwen3 computes."""

import json

import pytest
import torch

pytestmark = pytest.mark.vllm

VOCAB = 300
MASK = 299
THETA = 1_000_000.0
PROMPTS = [[5, 17, 200, 3, 299, 42], [7], list(range(1, 41))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small random Qwen3 in float32, its config.json as the published I-DLM checkpoints have it."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("sdar")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        initializer_range=0.2,  # spreads the logits, so that a wrong weight shows
        tie_word_embeddings=False,
        eos_token_id=0,
    )
    model = Qwen3ForCausalLM(config)
    for name, weight in model.named_parameters():
        if "norm" in name:  # all ones otherwise, and a norm left out would not show
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    model.save_pretrained(folder)
    published = {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        "auto_map": {
            "AutoConfig": "configuration_sdar.SDARConfig",
            "AutoModel": "modeling_sdar.SDARModel",
            "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
        },
        "rope_theta": THETA,
        "rope_scaling": None,
        "torch_dtype": "float32",
        "mask_token_id": MASK,
        "block_size": 4,
        "fuse_cross_entropy": True,
        "debug": False,
    }
    written = json.loads((folder / "config.json").read_text())
    for key in ("rope_parameters", "dtype"):  # the newer transformers' names of rope_theta and torch_dtype
        written.pop(key, None)
    (folder / "config.json").write_text(json.dumps({**written, **published}))
    for name in ("configuration_sdar.py", "modeling_sdar.py"):  # remote code must not run
        (folder / name).write_text("raise RuntimeError('remote code ran')\n")
    return folder, model


@pytest.fixture(scope="module")
def engine(checkpoint):
    """vLLM on that checkpoint, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM

        llm = LLM(
            str(checkpoint[0]),
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            max_model_len=128,
            max_num_seqs=4,
            max_logprobs=VOCAB,
            logprobs_mode="raw_logits",
            kv_cache_memory_bytes=16 << 20,
        )
        yield llm
        llm.llm_engine.engine_core.shutdown()


def dense(logprobs):
    """vLLM's logprobs of one position, all of the vocabulary, as a row. float32 [VOCAB]"""
    return torch.tensor([logprobs[token].logprob for token in range(VOCAB)])


def test_served_as_sdar(engine):
    config = engine.llm_engine.model_config
    assert config.architecture == "SDARForCausalLM"
    assert type(config.hf_config).__module__ == "vllm_idlm.models.sdar_config"
    assert (config.hf_config.model_type, config.hf_config.mask_token_id) == ("sdar", MASK)


def test_qwen3_keeps_its_name(engine):
    from transformers import Qwen3Config

    assert Qwen3Config.model_type == "qwen3"


def test_class_supports_what_its_parent_does():
    from vllm.model_executor.models.interfaces import supports_lora, supports_pp

    from vllm_idlm.models.sdar import SDARForCausalLM

    assert supports_lora(SDARForCausalLM)
    assert supports_pp(SDARForCausalLM)


@torch.no_grad()
def test_logits_equal_transformers_qwen3(checkpoint, engine):
    from vllm import SamplingParams

    _, model = checkpoint
    params = SamplingParams(
        temperature=0, max_tokens=8, ignore_eos=True, logprobs=VOCAB, prompt_logprobs=VOCAB, detokenize=False
    )
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        answer = output.outputs[0]
        expected = model(torch.tensor([[*prompt, *answer.token_ids]])).logits[0]
        assert answer.token_ids == expected[len(prompt) - 1 : -1].argmax(-1).tolist()
        found = [dense(row) for row in output.prompt_logprobs[1:]] + [dense(row) for row in answer.logprobs]
        torch.testing.assert_close(torch.stack(found), expected[:-1], atol=1e-4, rtol=1e-4)
