"""What a run leaves for serving: the adapter (peft) or the checkpoint, with isd.json beside it.

isd.json holds the stride, the mask token id, the base's name and fingerprint (the plugin reads these), and the record
of the training: configuration, tokens seen, held-out acceptance, versions.
"""

from __future__ import annotations

import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vllm_idlm.data.model import tokenizer_if_any
from vllm_idlm.training.config import Config

RECORD = "isd.json"


def record(config: Config, model: Any, base: Any, steps: int, found: dict[str, Any]) -> dict[str, Any]:
    """The content of isd.json; `found` holds mask_tokens_trained, seconds and the held-out figures."""
    content = {
        "stride": config.stride,
        "mask_token_id": base.mask_token_id,
        "base": base.name,
        "base_fingerprint": base.fingerprint,
        "form": config.form,
        "steps": steps,
        **found,
        "config": _public(config),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "vllm-idlm")},
        "date": time.strftime("%Y-%m-%d"),
    }
    if config.form == "gated":  # an adapter that the run went on from may differ from what the configuration says
        own = model.peft_config["default"]
        content["adapter"] = {"rank": own.r, "alpha": own.lora_alpha, "targets": sorted(own.target_modules)}
    return content


def _public(config: Config) -> dict[str, Any]:
    """The configuration without this machine's paths: of data and adapter their names."""
    content = config.model_dump(mode="json", exclude={"out", "model", "eval_data"})
    content["data"] = [Path(name).name for name in config.data]
    content["adapter"]["init"] = config.adapter.init and Path(config.adapter.init).name
    return content


def save(
    model: Any, weights: dict[str, torch.Tensor], folder: Path, content: dict[str, Any], tokenizer_from: str
) -> None:
    """Write the adapter or the whole checkpoint in bfloat16 (the model's dtype if full), and isd.json.

    weights: those that the run changed, by name, tied ones once, whole tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if content["form"] == "gated":
        model.save_pretrained(folder, state_dict=_adapter(model, weights), save_embedding_layers=False)
        _name_base(folder / "adapter_config.json", content["base"])
    else:
        model.config.mask_token_id = content["mask_token_id"]
        dtype = getattr(torch, content["config"]["dtype"])
        model.config.dtype = dtype
        model.save_pretrained(folder, state_dict={k: v.detach().to(dtype) for k, v in weights.items()})
        tokenizer = tokenizer_if_any(Path(tokenizer_from))  # a model of token ids alone has none
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    (folder / RECORD).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _adapter(model: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(model, weights, save_embedding_layers=False)
    return {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}


def _name_base(file: Path, base: str) -> None:
    """The base's public name in place of the folder that it was loaded from."""
    content = json.loads(file.read_text(encoding="utf-8"))
    content["base_model_name_or_path"] = base
    file.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
