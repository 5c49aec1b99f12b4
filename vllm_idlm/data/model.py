"""The model that answers: its folder, and an engine sized for the work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vllm_idlm import zoo

from .errors import DataError

_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_LEAST_CACHE = 200_000_000  # bytes


def locate(model: str) -> tuple[Path, dict[str, Any]]:
    """The folder of a zoo name, hub id (downloaded if need be) or folder, and the engine settings its zoo entry needs.

    Raises DataError where there is none; ZooError and EmbeddedModelError pass through.
    """
    entry = zoo.resolve(model)
    engine = {} if entry is None else entry.engine_defaults()
    place = model if entry is None else entry.model_path()
    if Path(place).is_dir():
        return Path(place), engine
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(place, allow_patterns=_FILES)), engine
    except Exception as error:  # its own errors, the network's, the file system's
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"--model {model}: no zoo name, no folder, and not to be had from the hub: {reason}") from None


def tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint folder (transformers)."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def engine_options(
    folder: Path, needs: dict[str, Any], dtype: str, length: int, batch: int, eager: bool
) -> dict[str, Any]:
    """Keyword arguments of vllm.LLM for sequences of at most `length` tokens (prompt and answer), `batch` at a time.

    On a CPU the cache is what `batch` sequences fill, at most half of the free memory: vLLM would take 92% of all.
    Elsewhere vLLM decides. Raises DataError if `length` is more than the model's context.
    """
    from transformers import AutoConfig
    from vllm.platforms import current_platform

    config = AutoConfig.from_pretrained(folder).get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and length > most:
        raise DataError(f"the longest prompt and --max-tokens need {length} tokens, the model has {most}; shorten them")
    window = -(-length // 256) * 256
    options = {**needs, "model": str(folder), "dtype": dtype, "max_num_seqs": batch, "seed": 0}
    options |= {"max_model_len": window if most is None else min(window, most), "enforce_eager": eager}
    options.pop("kv_cache_memory_bytes", None)
    if current_platform.is_cpu():
        options["kv_cache_memory_bytes"] = _cache_bytes(config, options["max_model_len"] * batch)
    return options


def _cache_bytes(config: Any, tokens: int) -> int:
    """Bytes of K and V of `tokens` tokens, 4 bytes a number to be safe; within the bounds."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    wanted = tokens * config.num_hidden_layers * 2 * heads * width * 4
    return max(_LEAST_CACHE, min(wanted, _free_memory() // 2))


def _free_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def tokenizer_if_any(folder: Path) -> Any | None:
    """The checkpoint's tokenizer, or None where it has none: samples of token ids need none."""
    kept = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    return tokenizer(folder) if any((folder / name).is_file() for name in kept) else None
