"""What the trainings of draft heads share: our adapter's data, the served model beside the head, one resumable run.

`benchmarks.eagle3` and `benchmarks.dflash` say what is theirs (a `Kind`). A head, its training forward and its loss are
those of the `speculators` library; the library's own trainer wants hidden states from a vLLM server, so here the
verifier runs beside the head in transformers. Budget: our adapter saw 973k mask tokens; three drafts at each of 320k
answer positions are as many. What comes out is a folder that vLLM serves.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import common

DRAFTS = 3
Row = tuple[list[int], list[int], list[int]]  # token ids, whether each is an answer's, number of its sample


@dataclass(frozen=True)
class Kind:
    """One kind of head: `build` an untrained one, its `inputs` for a row, and what its `metrics` say."""

    name: str
    build: Callable[[str, list[Any], argparse.Namespace], Any]
    """(verifier's folder, training samples, arguments) to the library's model."""
    inputs: Callable[[Verifier, Row], dict[str, Any]]
    """A packed row as the library's forward takes it."""
    given: Callable[[argparse.Namespace], dict[str, Any]]
    """What the library's forward takes beside a batch: the loss first of all."""
    positions: Callable[[dict[str, Any]], int]
    """Positions that drafts were made for, out of the forward's metrics."""
    accuracy: Callable[[dict[str, Any]], list[float]]
    """Agreement with the verifier's most probable token, by draft."""


def vocabulary(samples: list[Any], size: int, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """t2d [total] bool and d2t [size] int64 of the `size` most frequent tokens of the answers, as vLLM maps them."""
    counts = Counter(token for sample in samples for token in sample.answer_ids)
    chosen = [token for token, _ in counts.most_common(size)]
    rest = (token for token in range(total) if token not in counts)
    ids = torch.tensor(sorted(chosen + [next(rest) for _ in range(size - len(chosen))]))
    kept = torch.zeros(total, dtype=torch.bool)
    kept[ids] = True
    return kept, ids - torch.arange(size)


def batches(samples: list[Any], length: int, seed: int) -> Iterator[Row]:
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


def losses(args: argparse.Namespace) -> Any:
    """The library's loss by name."""
    from speculators.losses import resolve_loss_config

    return resolve_loss_config(args.loss, "eager")


class Verifier:
    """The frozen served model: what a head reads of it, for packed samples."""

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


def rate(done: float, warmup: float = 0.03, least: float = 0.03) -> float:
    """The learning rate as a share of its peak, at a share `done` of the run: a short rise, then a cosine."""
    return min((done + 1e-3) / warmup, least + (1 - least) * 0.5 * (1 + math.cos(math.pi * done)))


class Run:
    """A training run that goes on from its last checkpoint: OUT/checkpoint.pt, removed when it is over."""

    def __init__(self, kind: Kind, args: argparse.Namespace, head: Any) -> None:
        self.kind, self.args, self.head, self.file = kind, args, head, args.out / "checkpoint.pt"
        self.weights = {name: p for name, p in head.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.state: dict[str, Any] = {"seen": 0, "step": 0, "seconds": 0.0, "curve": []}
        args.out.mkdir(parents=True, exist_ok=True)
        if self.file.is_file():
            held = torch.load(self.file, weights_only=True)
            head.load_state_dict(held["weights"], strict=False)
            self.optimizer.load_state_dict(held["optimizer"])
            self.state = held["state"]
            print(f"going on from step {self.state['step']}", flush=True)

    def save(self) -> None:
        """Write the checkpoint; a half-written one never takes its place."""
        whole = {"weights": {n: p.data for n, p in self.weights.items()}, "state": self.state}
        torch.save({**whole, "optimizer": self.optimizer.state_dict()}, self.file.with_suffix(".new"))
        self.file.with_suffix(".new").rename(self.file)

    def step(self, batch: dict[str, Any], given: dict[str, Any]) -> None:
        """One optimizer step."""
        began = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            _, loss, metrics = self.head(**batch, **given)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * rate(self.state["seen"] / self.args.tokens)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state["seen"] += self.kind.positions(metrics)
        self.state["step"] += 1
        self.state["seconds"] += time.process_time() - began
        if self.state["step"] % self.args.report == 0:
            line = {name: self.state[name] for name in ("step", "seen")} | {"loss": round(float(loss.detach()), 4)}
            self.state["curve"].append({**line, "accepted": self.kind.accuracy(metrics)})
            print(json.dumps(self.state["curve"][-1]), flush=True)
            self.save()


def train(kind: Kind, args: argparse.Namespace) -> dict[str, Any]:
    """Train until `args.tokens` answer positions were seen; the record of it."""
    from vllm_idlm import embedded
    from vllm_idlm.data import samples as reader

    torch.manual_seed(args.seed)
    folder = str(embedded.ensure())
    train_set, held = reader.read(args.data, "train"), reader.read(args.data, "eval")
    head = kind.build(folder, train_set, args).float()
    verifier, run, given = Verifier(folder, head.target_layer_ids), Run(kind, args, head), kind.given(args)
    for number, row in enumerate(batches(train_set, args.row_tokens, args.seed)):
        if run.state["seen"] >= args.tokens:
            break
        if number >= run.state["step"]:
            run.step(kind.inputs(verifier, row), given)
    evaluated = evaluate(kind, head, verifier, held, args)
    export(head, args.out)
    run.file.unlink(missing_ok=True)
    size = sum(p.numel() for p in run.weights.values())
    return {**run.state, "trained_parameters": size, "held_out_accepted": evaluated}


def export(head: Any, folder: Path) -> None:
    """Write the head as vLLM serves it: in bfloat16, without the verifier's embedding, which vLLM shares with it."""
    from safetensors.torch import load_file, save_file

    head.save_pretrained(folder)
    file, config = folder / "model.safetensors", folder / "config.json"
    held = {n: t for n, t in load_file(file).items() if not n.startswith(("embed_tokens", "verifier"))}
    save_file({n: t.bfloat16() if t.is_floating_point() else t for n, t in held.items()}, file)
    facts = json.loads(config.read_text())
    facts["speculators_config"]["verifier"]["name_or_path"] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    facts["dtype"] = "bfloat16"
    config.write_text(json.dumps(facts, indent=1) + "\n")


@torch.no_grad()
def evaluate(kind: Kind, head: Any, verifier: Verifier, held: list[Any], args: argparse.Namespace) -> list[float]:
    """Held-out agreement with the verifier's most probable token, by draft, over twelve rows."""
    sums: Counter[str] = Counter()
    for _, row in zip(range(12), batches(held, args.row_tokens, 0), strict=False):
        with torch.autocast("cpu", torch.bfloat16):
            _, _, metrics = head(**kind.inputs(verifier, row), **kind.given(args))
        sums.update({name: float(value) for name, value in metrics.items()})
    return kind.accuracy(sums)


def main(kind: Kind, doc: str) -> None:
    """The command line of a kind of head."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="folders of samples (see idlm data)")
    parser.add_argument("--out", type=Path, default=Path(f"runs/{kind.name}-smollm2"))
    parser.add_argument("--tokens", type=int, default=320_000, help="answer positions to train on")
    parser.add_argument("--vocabulary", type=int, default=8192, help="tokens the head can draft")
    parser.add_argument("--row-tokens", type=int, default=448)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--loss", default="kl_div")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=int, default=20, help="steps between lines and checkpoints")
    args = parser.parse_args()
    found = train(kind, args)
    asked = {name: value if isinstance(value, int | float | list) else str(value) for name, value in vars(args).items()}
    asked["data"] = [Path(folder).name for folder in args.data]
    (args.out / "recipe.json").write_text(json.dumps({**common.record(found), "asked": asked}, indent=1) + "\n")
