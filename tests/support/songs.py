"""A synthetic language that a model of a million parameters learns in seconds: songs.

A song is a fixed row of tokens; a text is one song after another, each chosen at random. Inside a song the next tokens
follow from the last one and the song; at its end nothing tells which song comes next.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812

VOCAB, MASK, SONGS, LENGTH = 64, 1, 12, 36
_FIRST = 2  # token ids below are the end of text and the mask


def songs() -> list[list[int]]:
    """The songs: each its own name, then notes that other songs use too, in another order."""
    rng = random.Random(7)
    notes = range(_FIRST + SONGS, VOCAB)
    return [[_FIRST + i, *rng.sample(notes, LENGTH - 1)] for i in range(SONGS)]


def text(rng: random.Random, length: int) -> list[int]:
    """A text of `length` tokens."""
    every, made = songs(), []
    while len(made) < length:
        made += rng.choice(every)
    return made[:length]


def write_samples(file: Path, count: int, seed: int) -> None:
    """Samples as `idlm data` writes them: a prompt that is a song's beginning, and what follows."""
    rng = random.Random(seed)
    with file.open("w") as out:
        for _ in range(count):
            made = text(rng, 70)
            cut = rng.randint(1, 5)
            out.write(json.dumps({"prompt_ids": made[:cut], "answer_ids": made[cut:], "temperature": 1.0}) + "\n")


def write_base(folder: Path, steps: int = 250, hidden: int = 128) -> Path:
    """A Llama of a million parameters that knows the songs, as a float32 checkpoint."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model, rng = LlamaForCausalLM(config), random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        batch = torch.tensor([text(rng, 64) for _ in range(16)])
        loss = F.cross_entropy(model(input_ids=batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def write_world(folder: Path, train: int = 300, held_out: int = 12, steps: int = 250) -> Path:
    """A folder with a base model that knows the songs (after 250 steps), and samples to train on and held out."""
    write_base(folder / "base", steps)
    write_samples(folder / "train.jsonl", train, 1)
    write_samples(folder / "eval.jsonl", held_out, 2)
    return folder
