"""Speed of training mask rows over one clean pass, against the two-copy forward, and its share of the matmul rate.

    python -m benchmarks.training [--rounds 3] [--tilings 1,3]

Both take the same batches: clean and mask rows of SmolLM2-135M-Instruct with a rank-32 adapter, bfloat16, forward,
backward and optimizer step, turn and turn about. Two-copy is the straightforward form: all rows in one forward with a
dense mask, adapter and gradients everywhere, logits of every row held in float32 for the loss. The matmul rate is that
of this model's largest product (the one of gate_proj at 1024 rows) in the same run.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from benchmarks import common
from vllm_idlm import embedded
from vllm_idlm.training import forward
from vllm_idlm.training.config import Config
from vllm_idlm.training.layout import PADDING, Batch, Sample, lay_out, visible
from vllm_idlm.training.loop import Base, build
from vllm_idlm.training.objective import Objective

MASK = 16


def two_copy(model: Any, batch: Batch) -> torch.Tensor:
    """KL + TV of the mask rows from one forward of clean and mask rows in transformers' own attention."""
    rows, length = batch.tokens.shape
    queries = length + batch.start.shape[1]
    grid = torch.arange(rows)[:, None, None], torch.arange(queries)[None, :, None], torch.arange(queries)[None, None]
    seen = visible(batch, clean_queries=True, mask_queries=True)(*grid)[:, None]
    bias = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, torch.finfo(torch.bfloat16).min)
    logits = model(
        input_ids=torch.cat([batch.tokens, torch.full_like(batch.place, MASK)], 1),
        position_ids=torch.cat([batch.positions, batch.mask_positions()], 1),
        attention_mask=bias,
        use_cache=False,
    ).logits.float()
    anchors = batch.at_masks(logits[:, :length])[batch.real].detach()
    log_p, log_q = F.log_softmax(anchors, -1), F.log_softmax(logits[:, length:][batch.real], -1)
    p = log_p.exp()
    return ((p * (log_p - log_q)).sum(-1) + 1 - torch.minimum(p, log_q.exp()).sum(-1)).mean()


def operations(model: Any, batch: Batch) -> float:
    """Floating-point operations of the products with the base's weights that a step must do (attention not counted)."""
    layers = sum(
        p.numel() for n, p in model.named_parameters() if ".layers." in n and "lora_" not in n and p.dim() == 2
    )
    head = forward.head(model).numel()
    masks, clean = int(batch.real.sum()), int((batch.sample != PADDING).sum())
    return 2.0 * (layers * (clean + 2 * masks) + head * 3 * masks)  # q, p, and the gradient to the hidden state


def matmul_rate() -> float:
    """Operations a second of a [1024, 576] x [576, 1536] product in bfloat16."""
    a, b = torch.randn(1024, 576).bfloat16(), torch.randn(1536, 576).bfloat16()
    for _ in range(5):
        F.linear(a, b)
    began = time.perf_counter()
    for _ in range(40):
        F.linear(a, b)
    return 40 * 2 * a.numel() * b.shape[0] / (time.perf_counter() - began)


def batches(count: int, tilings: int) -> list[Batch]:
    """Random tokens in rows of 448, three samples each: time does not depend on what they say."""
    rng = random.Random(0)
    samples = [
        [Sample(*([rng.randrange(40000) for _ in range(n)] for n in (30, 119))) for _ in range(3)] for _ in range(count)
    ]
    return [lay_out([row], 3, tilings, rng) for row in samples]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tilings", default="1,3")
    args = parser.parse_args()
    config = Config(model="smollm2-135m-risd", out="unused", data=["unused"], steps=1)
    base = Base(config.model, str(embedded.ensure()), MASK, fingerprint="")
    ours = build(config, base)
    other = build(config, base)
    other.get_base_model().set_attn_implementation("sdpa")
    steps = {"ours": Objective(ours, config, MASK), "two-copy": lambda batch: two_copy(other, batch)}
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        for name, model in (("ours", ours), ("two-copy", other))
    }
    rows = []
    for tilings in map(int, args.tilings.split(",")):
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        rate = []
        for i, batch in enumerate(batches(args.rounds + 1, tilings)):
            for name, step in steps.items():
                began = time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16):
                    step(batch).backward()
                optimizers[name].step()
                optimizers[name].zero_grad()
                if i:  # the first round warms up
                    seconds[name].append(time.perf_counter() - began)
            rate.append(matmul_rate())
        masks, needed = int(batch.real.sum()), operations(ours, batch)
        taken = {name: statistics.median(values) for name, values in seconds.items()}
        rows.append({
            "tilings": tilings,
            "mask_tokens": masks,
            "mask_tokens_per_second": {name: round(masks / value, 1) for name, value in taken.items()},
            "ratio": round(statistics.median(b / a for a, b in zip(*seconds.values(), strict=True)), 2),
            "gigaflops": round(needed / taken["ours"] / 1e9, 1),
            "matmul_gigaflops": round(statistics.median(rate) / 1e9, 1),
            "share_of_matmul_rate": round(needed / taken["ours"] / statistics.median(rate), 3),
        })  # fmt: skip
        print(rows[-1], flush=True)
    print(common.save("training-cpu", {"threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    main()
