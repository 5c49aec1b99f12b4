"""An EAGLE-3 head for the embedded model, by the `speculators` library, on the data and budget of our own adapter.

    pip install --no-deps speculators hs-connectors loguru pydantic-settings
    pip install --no-deps datasets pyarrow dill multiprocess xxhash pandas
    python -m benchmarks.eagle3 data/chat --out runs/eagle3-smollm2 [--tokens 320000]    # again: goes on

The head, its training forward over three drafts (training-time test) and its loss are the library's. To serve it:
{"method": "eagle3", "model": "runs/eagle3-smollm2", "num_speculative_tokens": 3}. See benchmarks/heads.py.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks import heads


def build(folder: str, samples: list[Any], args: argparse.Namespace) -> Any:
    """An untrained head of one layer, of the verifier's own shape, with a vocabulary of its own."""
    from speculators.models.eagle3 import Eagle3DraftModel
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    kept, offsets = heads.vocabulary(samples, args.vocabulary, config.vocab_size)
    config.num_hidden_layers, config.tie_word_embeddings = 1, False
    return Eagle3DraftModel.from_training_args(
        config, t2d=kept, d2t=offsets, draft_vocab_size=args.vocabulary, norm_before_residual=True,
        ttt_steps=heads.DRAFTS, verifier_name_or_path=folder, draft_attn_impl="eager",
    )  # fmt: skip


def inputs(verifier: heads.Verifier, row: heads.Row) -> dict[str, Any]:
    """Token i + 1 beside the hidden state of token i."""
    ids, answers, numbers = row
    states, last, places = verifier.read(ids, numbers)
    same = torch.tensor(numbers[1:]) == torch.tensor(numbers[:-1])
    return {
        "hidden_states": states[:, :-1].float(),
        "input_ids": torch.tensor([ids[1:]]),
        "document_ids": torch.tensor([numbers[1:]]),
        "loss_mask": (torch.tensor([answers[1:]]).bool() & same),
        "position_ids": torch.tensor([places[1:]]),
        "verifier_last_hidden_states": last[:, 1:].float(),
    }


def accuracy(metrics: dict[str, Any]) -> list[float]:
    """Share of positions where this draft and those before it are the verifier's most probable tokens, by draft."""
    pairs = [(metrics[f"full_acc_{i}_sum"], metrics[f"full_acc_{i}_total"]) for i in range(heads.DRAFTS)]
    return [round(float(part / whole), 4) for part, whole in pairs]


KIND = heads.Kind(
    "eagle3", build, inputs, lambda args: {"ttt_steps": heads.DRAFTS, "loss_config": heads.losses(args)},
    positions=lambda metrics: int(metrics["full_acc_0_total"]), accuracy=accuracy,
)  # fmt: skip

if __name__ == "__main__":
    heads.main(KIND, __doc__)
