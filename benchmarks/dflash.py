"""A DFlash head for the embedded model, by the `speculators` library, on the data and budget of our own adapter.

    pip install --no-deps speculators hs-connectors loguru pydantic-settings
    pip install --no-deps datasets pyarrow dill multiprocess xxhash pandas
    python -m benchmarks.dflash data/chat --out runs/dflash-smollm2 [--tokens 320000]    # again: goes on

DFlash drafts a block in one forward: the newest token (the anchor) and three masks see each other and, in every layer,
the served model's hidden states of all tokens before. Head, training forward over anchored blocks and loss are the
library's; every answer position is an anchor once. To serve it:
{"method": "dflash", "model": "runs/dflash-smollm2", "num_speculative_tokens": 3}. See benchmarks/heads.py.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks import heads

LAYERS = 3  # read once a draft step: as many weights as EAGLE-3's one layer in three forwards
MASK = 16  # the mask token of our adapter, which no answer holds

SHAPE = [
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
]  # fmt: skip


def build(folder: str, samples: list[Any], args: argparse.Namespace) -> Any:
    """An untrained head of three layers of the verifier's width, with a vocabulary of its own."""
    from speculators.models.dflash import DFlashDraftModel
    from transformers import AutoConfig, Qwen3Config

    own = AutoConfig.from_pretrained(folder)
    kept, offsets = heads.vocabulary(samples, args.vocabulary, own.vocab_size)
    config = Qwen3Config(
        **{name: getattr(own, name) for name in SHAPE}, num_hidden_layers=LAYERS, tie_word_embeddings=False
    )
    # Without `sliding_window_non_causal` vLLM 0.32 serves every layer causally, which a block was not trained for.
    return DFlashDraftModel.from_training_args(
        config, t2d=kept, d2t=offsets, draft_vocab_size=args.vocabulary, block_size=heads.DRAFTS + 1,
        mask_token_id=MASK, sliding_window_non_causal=True, verifier_name_or_path=folder, draft_attn_impl="sdpa",
    )  # fmt: skip


def inputs(verifier: heads.Verifier, row: heads.Row) -> dict[str, Any]:
    """Tokens as they stand beside their own hidden states; every answer token can be an anchor."""
    ids, answers, numbers = row
    states, last, places = verifier.read(ids, numbers)
    return {
        "hidden_states": states.float(),
        "input_ids": torch.tensor([ids]),
        "document_ids": torch.tensor([numbers]),
        "loss_mask": torch.tensor([answers]).bool(),
        "position_ids": torch.tensor([places]),
        "verifier_last_hidden_states": last.float(),
        "max_anchors": sum(answers[: -heads.DRAFTS - 1]),  # all: the library leaves out the row's last block
    }


def accuracy(metrics: dict[str, Any]) -> list[float]:
    """Share of blocks where this draft is the verifier's most probable token, by draft, then the accepted length.

    The length counts the verifier's own token; only drafts whose predecessors agree count in it.
    """
    places = [(f"position_{i}_acc_sum", f"position_{i}_acc_total") for i in range(1, heads.DRAFTS + 1)]
    return [round(float(metrics[part] / metrics[whole]), 4) for part, whole in [*places, ("eal_sum", "eal_total")]]


KIND = heads.Kind(
    "dflash", build, inputs, lambda args: {"loss_config": heads.losses(args)},
    positions=lambda metrics: int(metrics["position_1_acc_total"]), accuracy=accuracy,
)  # fmt: skip

if __name__ == "__main__":
    heads.main(KIND, __doc__)
