"""Dequantise a Llama-type GGUF file into a Hugging Face checkpoint: config, tokenizer, bfloat16 safetensors.

Written out here because transformers' own GGUF reader falls short of it in two ways: version 5 keeps the weights packed
unless told otherwise, and its tokenizer drops SmolLM2's digit splitting ("\\n\\n1" then starts with two newline tokens
where the model was trained on one). Formats: the GGUF specification, and `gguf.quants` for the blocks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_CONTROL_TOKEN = 3  # GGUF's token type of special tokens


def convert(gguf_file: Path, out: Path, on_tensor: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Write the checkpoint of `gguf_file` into the folder `out`; calls `on_tensor(done, total)` after each tensor."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise ValueError(f"{gguf_file}: architecture {fields['general.architecture']!r}, only 'llama' is supported")
    _write_weights(reader.tensors, fields, out, on_tensor)
    _write_configs(fields, out, tied=not any(t.name == "output.weight" for t in reader.tensors))
    _write_tokenizer(fields, out)


def tensor_name(gguf_name: str) -> str:
    """The Hugging Face name of a Llama tensor: "blk.3.attn_q.weight" is "model.layers.3.self_attn.q_proj.weight"."""
    stem = gguf_name.removesuffix(".weight")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.weight"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"


def _write_weights(tensors, fields: dict, out: Path, on_tensor) -> None:
    import torch
    from gguf import dequantize
    from safetensors.torch import save_file

    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    weights = {}
    for done, tensor in enumerate(tensors, start=1):
        values = dequantize(tensor.data, tensor.tensor_type)  # float32 [out, in] or [size]
        part = tensor.name.split(".")[-2]
        if part in heads:
            values = _halves_from_pairs(values, heads[part])
        weights[tensor_name(tensor.name)] = torch.from_numpy(values.copy()).bfloat16()
        on_tensor(done, len(tensors))
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def _halves_from_pairs(weight, heads: int):
    """Undo GGUF's order of rotary dimensions in q and k [heads * dim, in]: neighbouring pairs there, halves here."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write_configs(fields: dict, out: Path, tied: bool) -> None:
    heads, width = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    tokens = {name: fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")}
    ids = {f"{name}_token_id": token for name, token in tokens.items()}
    ids["pad_token_id"] = fields.get("tokenizer.ggml.padding_token_id", tokens["eos"])
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "dtype": "bfloat16",
        "head_dim": width // heads,
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        # stored as float32: 9.9999997e-06 is 1e-05
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(fields["llama.rope.freq_base"])},
        "tie_word_embeddings": tied,
        "vocab_size": fields["llama.vocab_size"],
        **ids,
    }
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", ids)


def _write_tokenizer(fields: dict, out: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"tokenizer {kind} is not supported, only ('gpt2', 'smollm')")
    words = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    special = [word for word, kind in zip(words, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    tokenizer.save(str(out / "tokenizer.json"))

    named = {name: words[fields[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos", "unknown", "padding")}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": named["bos"],
        "eos_token": named["eos"],
        "unk_token": named["unknown"],
        "pad_token": named["padding"],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
    }
    _write_json(out / "tokenizer_config.json", settings)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
