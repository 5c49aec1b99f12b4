"""How fast the gated adapter trains here, and where a step's time goes. Needs torch, transformers and peft, not vLLM.

    train_smoke.py [--rows 2,16,32] [--steps 6] [--fix]

--fix: with block masks compiled and larger chunks of logits (training_patches.py).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jobs

# isort: split
import torch
import training_patches

from vllm_idlm.training import forward, losses
from vllm_idlm.training.config import Config
from vllm_idlm.training.layout import Batch, Sample, lay_out
from vllm_idlm.training.loop import Base, build
from vllm_idlm.training.objective import Objective

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STRIDE = 4
PROMPT = 30  # tokens
WARM = 2  # steps that are not counted: they compile


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rows", default="2,16,32")
    made.add_argument("--steps", type=int, default=6)
    made.add_argument("--row-tokens", type=int, default=512)
    made.add_argument("--tilings", type=int, default=3)
    made.add_argument("--fix", action="store_true")
    made.add_argument("--name", default="train-smoke", help="of the job")
    made.add_argument("--model", help="folder of a checkpoint; default: the embedded SmolLM2")
    made.add_argument("--mask", type=int, default=16, help="mask token id")
    return made


def wait() -> None:
    """Wait until the device has done its work."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


class Trainer:
    """A model with a new adapter, and what a step needs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.vocabulary = args, 0
        folder = args.model or self._embedded()
        tokens = args.row_tokens
        config = Config(
            model="smollm2-135m-risd", out="unused", data=["unused"], steps=1, loss={"tv": 1.0},
            depth_weights=[1.0, 0.7, 0.5], tilings=args.tilings, row_tokens=tokens, max_tokens=min(384, tokens),
        )  # fmt: skip
        self.model = build(config, Base(config.model, folder, args.mask, fingerprint="")).to(DEVICE)
        self.vocabulary = self.model.config.vocab_size
        self.objective = Objective(self.model, config, args.mask)
        self.weights = [w for w in self.model.parameters() if w.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-3, betas=config.betas)

    @staticmethod
    def _embedded() -> str:
        from vllm_idlm import embedded

        return str(embedded.ensure())

    def batch(self, rows: int, rng: random.Random) -> Batch:
        """Rows of made-up samples, as a step takes them."""
        made = lay_out([self._row(rng) for _ in range(rows)], STRIDE - 1, self.args.tilings, rng).to(DEVICE)
        return forward.padded(made, self.args.row_tokens)

    def _row(self, rng: random.Random) -> list[Sample]:
        row, room = [], self.args.row_tokens
        while room >= 3 * PROMPT:
            answer = min(rng.randrange(64, 256), room - PROMPT)
            ids = [rng.randrange(20, self.vocabulary) for _ in range(PROMPT + answer)]
            row.append(Sample(ids[:PROMPT], ids[PROMPT:]))
            room -= len(ids)
        return row

    def loss(self, batch: Batch) -> torch.Tensor:
        """The loss of a forward."""
        with torch.autocast(DEVICE, torch.bfloat16):
            return self.objective(batch)

    def learn(self) -> None:
        """The optimizer's part of a step."""
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def steps(trainer: Trainer, rows: int, rng: random.Random) -> tuple[dict[str, Any], Batch]:
    """The time of steps with so many rows; and the last batch."""
    began, laid, whole, masks, count = time.perf_counter(), [], [], 0, trainer.args.steps
    found: dict[str, Any] = {}
    for i in range(count + WARM):
        at = time.perf_counter()
        batch = trainer.batch(rows, rng)
        wait()
        ready = time.perf_counter()
        loss = trainer.loss(batch)
        loss.backward()
        trainer.learn()
        wait()
        if i == 0:
            found["first_step_s"] = round(time.perf_counter() - began, 1)
        if i >= WARM:
            laid.append(ready - at)
            whole.append(time.perf_counter() - ready)
            masks += int(batch.real.sum())
    found |= {
        "loss": float(loss.detach()), "mask_tokens_per_step": masks // count,
        "step_ms": round(1e3 * statistics.median(whole), 1), "lay_out_ms": round(1e3 * statistics.median(laid), 1),
        "mask_tokens_per_s": round(masks / (sum(whole) + sum(laid))),
        "shape": [list(batch.tokens.shape), list(batch.start.shape)],
    }  # fmt: skip
    if DEVICE == "cuda":
        found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return found, batch


@contextlib.contextmanager
def clocks(spent: dict[str, float]) -> Iterator[None]:
    """Functions of a forward with a clock each, and a wait for the device before and behind."""
    places = {"block_mask": (forward, "who_sees_whom"), "clean": (forward, "clean"), "masks": (forward, "masks")}
    places["loss"] = (losses, "fused")
    kept = {name: getattr(*place) for name, place in places.items()}
    for name, (module, attribute) in places.items():
        setattr(module, attribute, _clocked(spent, name, kept[name]))
    try:
        yield
    finally:
        for name, (module, attribute) in places.items():
            setattr(module, attribute, kept[name])


def _clocked(spent: dict[str, float], name: str, function: Callable) -> Callable:
    def run(*args: Any, **options: Any) -> Any:
        wait()
        began = time.perf_counter()
        out = function(*args, **options)
        wait()
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - began
        return out

    return run


def parts(trainer: Trainer, batch: Batch) -> dict[str, float]:
    """Milliseconds of a step by its parts; waited for, so that they add up to more than the whole."""
    spent: dict[str, float] = {}
    with clocks(spent):
        for _ in range(2):
            found: list[torch.Tensor] = []
            _clocked(spent, "forward", lambda found=found: found.append(trainer.loss(batch)))()
            _clocked(spent, "backward", lambda found=found: found[0].backward())()
            _clocked(spent, "optimizer", trainer.learn)()
    return {name: round(500 * seconds, 1) for name, seconds in spent.items()}


def main() -> None:
    """One line of results for each number of rows."""
    args = parser().parse_args()
    if args.fix:
        training_patches.masks_and_chunks()
    jobs.gate()
    trainer, rng = Trainer(args), random.Random(0)
    for rows in map(int, args.rows.split(",")):
        found = {"job": args.name, "rows": rows, "fix": args.fix}
        try:
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
            measured, batch = steps(trainer, rows, rng)
            found |= {**measured, "parts_ms": parts(trainer, batch)}
        except Exception as error:  # the next number of rows may fit
            traceback.print_exc()
            found["error"] = f"{type(error).__name__}: {str(error)[:500]}"
        print(json.dumps(found), flush=True)
        jobs.result(found)


if __name__ == "__main__":
    main()
    jobs.leave()
