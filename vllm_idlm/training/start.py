"""From a configuration to a run: the base's folder and mask token, the samples; checked before any work is done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_idlm.data import samples as data
from vllm_idlm.data.model import locate
from vllm_idlm.fingerprint import FingerprintError, fingerprint, other_base
from vllm_idlm.settings import adapter_record
from vllm_idlm.training.config import Config, ConfigError
from vllm_idlm.training.layout import Sample
from vllm_idlm.training.loop import Base, Run, check_mask, with_adapter


def base(config: Config) -> Base:
    """The base model of a configuration; ConfigError if its mask token is not known or its weights cannot be told."""
    from vllm_idlm import zoo

    folder, _ = locate(config.model)
    entry = zoo.resolve(config.model)
    mask = config.mask_token_id if config.mask_token_id is not None else entry and entry.mask_token_id
    if mask is None:
        raise ConfigError(
            f"mask_token_id: not given, and {config.model!r} is no zoo name that has one. Fix: the id of a token that "
            "the model never writes, such as a reserved special token"
        )
    try:
        made = Base(config.model if entry is None else entry.model, str(folder), mask, fingerprint(folder))
    except FingerprintError as error:
        raise ConfigError(f"model: {error}") from None
    if config.adapter.init and config.form == "gated":
        check_base(adapter_record(config.adapter.start), folder, config.adapter.start)
    return made


def samples(config: Config, tokenizer: Any) -> tuple[list[Sample], list[Sample]]:
    """Samples to train on and held-out ones; answers beyond `max_tokens` are cut, prompts that leave none are left out.

    Raises DataError or ConfigError if nothing remains.
    """
    train = data.read(config.data, "train", tokenizer)
    sources = config.eval_data or [path for path in config.data if Path(path).is_dir()]  # folders have an eval split
    held = data.read(sources, "eval", tokenizer) if sources else []
    return cut(train, config.max_tokens, "data"), cut(held, config.max_tokens, "eval_data") if held else []


def cut(found: Sequence[Any], max_tokens: int, field: str) -> list[Sample]:
    """Samples of at most `max_tokens`; ConfigError, naming `field`, if none has an answer left that can be trained."""
    made = []
    for one in found:
        answer = one.answer_ids[: max(0, max_tokens - len(one.prompt_ids))]
        if len(answer) >= 3:  # the first mask predicts the third token of an answer
            made.append(Sample(one.prompt_ids, answer))
    if not made:
        raise ConfigError(
            f"{field}: none of {len(found)} samples has an answer of 3 tokens or more within max_tokens "
            f"{max_tokens}; raise max_tokens, or give samples with answers"
        )
    return made


def check_tokens(made: Sequence[Sample], vocabulary: int, field: str) -> None:
    """ConfigError if a sample holds a token that the model does not have."""
    top = max(max(max(s.prompt, default=0), max(s.answer)) for s in made)
    if top >= vocabulary:
        raise ConfigError(
            f"{field}: it holds token id {top}, the model's vocabulary ends at {vocabulary - 1}; the samples belong to "
            "another model: make them with `idlm data --model` of this one"
        )


def run(config: Config, base: Base, train: list[Sample], held: list[Sample], report: Any) -> Run:
    """The run, ready to train or to resume."""
    made = Run(config, base, train, held, report)
    vocabulary = made.model.config.vocab_size
    check_tokens(train, vocabulary, "data")
    if held:
        check_tokens(held, vocabulary, "eval_data")
    return made


def for_evaluation(model: str, lora: str | None, mask_token_id: int | None, dtype: str) -> tuple[Any, Path, int]:
    """A model with its adapter (None: the zoo entry's, "none": without), its folder and its mask token id.

    Raises ConfigError where the adapter belongs to another base or no mask token is known.
    """
    import torch

    from vllm_idlm import zoo
    from vllm_idlm.training import forward

    if dtype not in ("bfloat16", "float32"):
        raise ConfigError(f"dtype: {dtype!r}; allowed are bfloat16 and float32")
    folder, _ = locate(model)
    entry = zoo.resolve(model)
    adapter = entry.lora_path() if entry and lora is None else lora
    adapter = None if adapter == "none" else adapter
    record = adapter_record(adapter) if adapter else {}
    check_base(record, folder, str(adapter))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = forward.load(str(folder), getattr(torch, dtype), device)
    known = (mask_token_id, record.get("mask_token_id"), entry and entry.mask_token_id)
    known = (*known, getattr(loaded.config, "mask_token_id", None))
    mask = next((m for m in known if m is not None), None)
    if mask is None:
        raise ConfigError(f"mask_token_id: neither the adapter nor {model} names one; give --mask-token-id")
    check_mask(mask, loaded, model)
    return (with_adapter(loaded, adapter) if adapter else loaded).eval(), folder, mask


def check_base(record: dict[str, Any], folder: Path, adapter: str) -> None:
    """ConfigError if the adapter's record names another base than the checkpoint in `folder`."""
    try:
        differ = other_base(record, folder)
    except FingerprintError as error:
        raise ConfigError(f"model: {error}") from None
    if differ:
        raise ConfigError(
            f"{adapter} was trained for {differ[0]}, and {folder} is another model {differ[1]}; give that base, or an "
            "adapter made for this one"
        )
