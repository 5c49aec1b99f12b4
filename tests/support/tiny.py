"""Tiny random checkpoints and adapters that transformers and vLLM both load.

There is no tokenizer: give token ids, and load in vLLM with `skip_tokenizer_init=True`. The head size is 32, the least
that vLLM's CPU attention supports; the weights are float32.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

HEAD_DIM = 32


def write_tiny(
    path: str | Path,
    *,
    vocab: int = 48,
    layers: int = 2,
    hidden: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    kind: str = "qwen3",
    seed: int = 0,
    scale: float = 1.5,
    positions: int = 1024,
) -> Path:
    """Write a random checkpoint of `kind` "qwen3" or "llama". scale: about the standard deviation of the logits."""
    import transformers

    classes = {
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    }
    config_class, model_class = classes[kind]
    config = config_class(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        dtype="float32",
    )
    model = model_class(config).to(torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:  # norms stay at 1
            continue
        nn.init.normal_(weight, std=_std(name, weight, scale), generator=generator)
    model.save_pretrained(str(path), safe_serialization=True)
    return Path(path)


def _std(name: str, weight: torch.Tensor, scale: float) -> float:
    """Small embeddings and strong layers, so that the whole context counts and greedy decoding does not soon repeat."""
    if name.endswith("embed_tokens.weight"):
        return 0.1
    return (scale if name.startswith("lm_head") else 2.0) * weight.shape[1] ** -0.5


def load_tiny(path: str | Path) -> nn.Module:
    """The checkpoint as a transformers model, float32, in eval mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32).eval()


def write_adapter(
    path: str | Path, model_path: str | Path, *, rank: int = 8, seed: int = 1, scale: float = 1.0, head: bool = False
) -> Path:
    """Write a random LoRA on every projection of the checkpoint at `model_path`, in peft's format.

    scale: the size of the update relative to the module's own output, roughly. head: on the output head alone.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    with safe_open(str(Path(model_path) / "model.safetensors"), "pt") as model:
        for key in sorted(k for k in model.keys() if ("lm_head." if head else "_proj.") in k):  # noqa: SIM118
            out, inner = model.get_slice(key).get_shape()
            name = f"base_model.model.{key.removesuffix('.weight')}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, inner, generator=generator) * inner**-0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * scale * rank**-0.5 / 2
    save_file(tensors, str(path / "adapter_model.safetensors"))
    modules = sorted({name.split(".")[-3] for name in tensors})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model_path),
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
        "inference_mode": True,
    }
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return path
