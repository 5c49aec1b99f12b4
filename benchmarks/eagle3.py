"""An EAGLE-3 head for the embedded model, by the `speculators` library, on the data and budget of our own adapter.

    pip install --no-deps speculators hs-connectors loguru pydantic-settings
    pip install --no-deps datasets pyarrow dill multiprocess xxhash pandas
    python -m benchmarks.eagle3 data/chat --out runs/eagle3-smollm2 [--tokens 320000]

The head, its training forward over three drafts (training-time test) and its loss are the library's; its own trainer
wants hidden states from a vLLM server, so here the verifier runs beside the head in transformers. Budget: our adapter
saw 973k mask tokens, three a position; three drafts at 320k answer positions are as many. What comes out is a folder
that vLLM serves: {"method": "eagle3", "model": "runs/eagle3-smollm2", "num_speculative_tokens": 3}.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import common

DRAFTS = 3


def vocabulary(samples: list[Any], size: int, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """t2d [total] bool and d2t [size] int64 of the `size` most frequent tokens of the answers, as vLLM maps them."""
    counts = Counter(token for sample in samples for token in sample.answer_ids)
    chosen = [token for token, _ in counts.most_common(size)]
    rest = (token for token in range(total) if token not in counts)
    ids = torch.tensor(sorted(chosen + [next(rest) for _ in range(size - len(chosen))]))
    kept = torch.zeros(total, dtype=torch.bool)
    kept[ids] = True
    return kept, ids - torch.arange(size)


def batches(samples: list[Any], length: int, seed: int) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """Token ids, whether each is an answer's, and its sample's number: packed to `length` tokens, without end."""
    rng, row = random.Random(seed), ([], [], [])
    while True:
        for sample in rng.sample(samples, len(samples)):
            ids = (sample.prompt_ids + sample.answer_ids)[:length]
            if len(row[0]) + len(ids) > length:
                yield row
                row = ([], [], [])
            number = row[2][-1] + 1 if row[2] else 0
            answers = [int(i >= len(sample.prompt_ids)) for i in range(len(ids))]
            for held, new in zip(row, (ids, answers, [number] * len(ids)), strict=True):
                held += new


class Verifier:
    """The frozen served model: what EAGLE-3 reads of it, for packed samples."""

    def __init__(self, folder: str, layers: list[int]) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.layers, self.last = layers, None
        self.model.model.norm.register_forward_pre_hook(lambda _, given: setattr(self, "last", given[0]))

    @torch.no_grad()
    def read(self, ids: list[int], numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Hidden states of the layers [1, L, 3 H], the last before the norm [1, L, H], places in the samples."""
        places = [i - numbers.index(number) for i, number in enumerate(numbers)]
        owner = torch.tensor(numbers)
        sees = (owner[:, None] == owner[None, :]).tril()
        bias = torch.zeros(sees.shape, dtype=torch.bfloat16).masked_fill(~sees, torch.finfo(torch.bfloat16).min)
        out = self.model.model(
            torch.tensor([ids]), attention_mask=bias[None, None], position_ids=torch.tensor([places]),
            output_hidden_states=True, use_cache=False,
        )  # fmt: skip
        states = torch.cat([out.hidden_states[layer] for layer in self.layers], dim=-1)
        return states, self.last, places


def inputs(verifier: Verifier, row: tuple[list[int], list[int], list[int]], dtype: torch.dtype) -> dict[str, Any]:
    """A packed row as the library's forward takes it: token i + 1 beside the hidden state of token i."""
    ids, answers, numbers = row
    states, last, places = verifier.read(ids, numbers)
    same = torch.tensor(numbers[1:]) == torch.tensor(numbers[:-1])
    return {
        "hidden_states": states[:, :-1].to(dtype),
        "input_ids": torch.tensor([ids[1:]]),
        "document_ids": torch.tensor([numbers[1:]]),
        "loss_mask": (torch.tensor([answers[1:]]).bool() & same),
        "position_ids": torch.tensor([places[1:]]),
        "verifier_last_hidden_states": last[:, 1:].to(dtype),
    }


def build(folder: str, samples: list[Any], size: int) -> Any:
    """An untrained head of one layer, of the verifier's own shape, with a vocabulary of `size` tokens."""
    from speculators.models.eagle3 import Eagle3DraftModel
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    kept, offsets = vocabulary(samples, size, config.vocab_size)
    config.num_hidden_layers, config.tie_word_embeddings = 1, False
    return Eagle3DraftModel.from_training_args(
        config, t2d=kept, d2t=offsets, draft_vocab_size=size, norm_before_residual=True, ttt_steps=DRAFTS,
        verifier_name_or_path=folder, draft_attn_impl="eager",
    )  # fmt: skip


def rate(done: float, warmup: float = 0.03, least: float = 0.03) -> float:
    """The learning rate as a share of its peak, at a share `done` of the run: a short rise, then a cosine."""
    return min((done + 1e-3) / warmup, least + (1 - least) * 0.5 * (1 + math.cos(math.pi * done)))


def accuracy(metrics: dict[str, Any]) -> list[float]:
    """Share of positions where the head's most probable token is the verifier's, by draft."""
    pairs = [(metrics[f"full_acc_{i}_sum"], metrics[f"full_acc_{i}_total"]) for i in range(DRAFTS)]
    return [round(float(part / whole), 4) for part, whole in pairs]


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train until `args.tokens` answer positions were seen or `args.minutes` are over; the record of it."""
    from speculators.losses import resolve_loss_config

    from vllm_idlm import embedded
    from vllm_idlm.data import samples as reader

    torch.manual_seed(args.seed)
    folder = str(embedded.ensure())
    train_set, held = reader.read(args.data, "train"), reader.read(args.data, "eval")
    head = build(folder, train_set, args.vocabulary).to(torch.bfloat16 if args.bfloat16 else torch.float32)
    verifier = Verifier(folder, head.target_layer_ids)
    weights = [p for p in head.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    given = {"ttt_steps": DRAFTS, "loss_config": resolve_loss_config(args.loss, "eager")}
    seen, step, done, began, curve = 0, 0, 0.0, time.time(), []
    for row in batches(train_set, args.row_tokens, args.seed):
        batch = inputs(verifier, row, weights[0].dtype)
        with torch.autocast("cpu", torch.bfloat16):
            _, loss, metrics = head(**batch, **given)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate(done)
        optimizer.step()
        optimizer.zero_grad()
        seen, step = seen + int(batch["loss_mask"].sum()), step + 1
        done = max(seen / args.tokens, (time.time() - began) / 60 / args.minutes)
        if step % args.report == 0:
            curve.append({"step": step, "positions": seen, "loss": round(float(loss), 4), "top1": accuracy(metrics)})
            print(json.dumps({**curve[-1], "seconds": round(time.time() - began)}), flush=True)
        if done >= 1:
            break
    evaluated = evaluate(head, verifier, held, args, given)
    head.save_pretrained(args.out)
    size = sum(p.numel() for p in weights)
    facts = {"steps": step, "positions": seen, "seconds": round(time.time() - began), "parameters": size}
    return {**facts, "held_out_top1": evaluated, "curve": curve}


@torch.no_grad()
def evaluate(head: Any, verifier: Verifier, held: list[Any], args: argparse.Namespace, given: dict) -> list[float]:
    """Held-out agreement with the verifier's most probable token, by draft, over twelve rows."""
    sums: Counter[str] = Counter()
    for _, row in zip(range(12), batches(held, args.row_tokens, 0), strict=False):
        with torch.autocast("cpu", torch.bfloat16):
            _, _, metrics = head(**inputs(verifier, row, next(head.parameters()).dtype), **given)
        sums.update({name: float(value) for name, value in metrics.items()})
    return accuracy(sums)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="folders of samples (see idlm data)")
    parser.add_argument("--out", type=Path, default=Path("runs/eagle3-smollm2"))
    parser.add_argument("--tokens", type=int, default=320_000, help="answer positions to train on")
    parser.add_argument("--minutes", type=float, default=600, help="the run is over by then, its learning rate too")
    parser.add_argument("--vocabulary", type=int, default=8192, help="tokens the head can draft")
    parser.add_argument("--row-tokens", type=int, default=448)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--loss", default="kl_div")
    parser.add_argument("--bfloat16", action="store_true", help="weights of the head, too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=int, default=20, help="steps between lines")
    args = parser.parse_args()
    found = train(args)
    asked = {name: value if isinstance(value, int | float | list) else str(value) for name, value in vars(args).items()}
    asked["data"] = [Path(folder).name for folder in args.data]
    (args.out / "recipe.json").write_text(json.dumps({**common.record(found), "asked": asked}, indent=1) + "\n")


if __name__ == "__main__":
    main()
