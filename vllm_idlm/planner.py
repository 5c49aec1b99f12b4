"""A model of one decode step, and what follows from it: is ISD worth it, at which stride, for how many requests.

    t(C, r) = weights / bandwidth + 2 params C r / flops + C context kv / bandwidth + all-reduces + fixed

with C requests of r rows each (r = 1 plain, 2n - 1 ISD, n - 1 more for each extra group of masks). The terms add up:
neither the CPU's kernels nor the authors' on an H100 overlap them well enough for a maximum to fit. ISD yields TPF
tokens a forward (`tpf`), so its speed-up over plain decoding is TPF / OH with OH = t(C, r) / t(C, 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_idlm.proposers.coverage import expected_tokens, outcomes


class PlanError(ValueError):
    """Something the planner cannot work with: the message names it, what is allowed and the fix."""


class Hardware(BaseModel):
    """One device, as a file of `configs/hardware/` states it. SI units."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str
    bandwidth: float = Field(gt=0, description="Memory bandwidth by the data sheet, bytes/s.")
    flops: float = Field(gt=0, description="Dense bfloat16 rate by the data sheet, operations/s.")
    bandwidth_efficiency: float = Field(gt=0, le=1, description="Share of it that decoding reaches.")
    flops_efficiency: float = Field(gt=0, le=1, description="Share of it that thin products reach.")
    step_ms: float = Field(ge=0, description="What a step costs beside the model: launches, scheduling, sampling.")
    isd_ms: float = Field(0.0, ge=0, description="What ISD adds to it.")
    lora_efficiency: float | None = Field(
        None, gt=0, le=1, description="Share of the rate that an adapter's products reach; default: as all others."
    )
    memory: float = Field(gt=0, description="Bytes.")
    allreduce_us: float = Field(0.0, ge=0, description="Latency of one all-reduce.")
    link: float = Field(1e12, gt=0, description="Bandwidth between devices, bytes/s.")
    processor: str | None = Field(
        None, description="A CPU's name as results record it: only what was measured on it is held against this device."
    )


class Shape(BaseModel):
    """A dense decoder by the sizes in its config.json."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    head_dim: int | None = None
    bytes_per_value: float = 2.0

    @property
    def heads(self) -> tuple[int, int]:
        """Widths of queries and of keys."""
        dim = self.head_dim or self.hidden_size // self.num_attention_heads
        return self.num_attention_heads * dim, self.num_key_value_heads * dim

    @property
    def params(self) -> int:
        """Parameters a token runs through: all projections and the head; the embedding is a look-up."""
        queries, keys = self.heads
        attention = self.hidden_size * (2 * queries + 2 * keys)
        layer = attention + 3 * self.hidden_size * self.intermediate_size
        return self.num_hidden_layers * layer + self.hidden_size * self.vocab_size

    @property
    def kv_bytes(self) -> float:
        """Keys and values of a token."""
        return 2 * self.num_hidden_layers * self.heads[1] * self.bytes_per_value

    def lora_params(self, rank: int) -> int:
        """A gated adapter on every projection."""
        queries, keys = self.heads
        widths = 2 * (self.hidden_size + queries) + 2 * (self.hidden_size + keys)
        return self.num_hidden_layers * rank * (widths + 3 * (self.hidden_size + self.intermediate_size))


def tpf(acceptance: Sequence[float], groups: int = 0) -> float:
    """Tokens per forward for conditional acceptances a1..a(n-1) of the drafts of a row.

    E = 1 + a1 + a1 a2 + .. tokens from a verify forward; a cold one follows unless masks stand behind what was
    accepted: behind all drafts always, behind the `groups` likeliest other outcomes if the row carries extra groups.
    """
    chances = outcomes(acceptance)
    missed = max(1 - chances[-1] - sum(sorted(chances[:-1], reverse=True)[:groups]), 0.0)
    return (expected_tokens(acceptance) + missed) / (1 + missed)


@dataclass(frozen=True)
class Plan:
    """A model on some devices. rank: of the gated adapter, 0 for a full I-DLM."""

    shape: Shape
    hardware: Hardware
    tensor_parallel: int = 1
    context: int = 1000
    rank: int = 0

    def step_ms(self, requests: int, n: int, groups: int = 0) -> float:
        """Time of a forward at stride n (1: plain decoding) with that many extra groups of masks, in ms."""
        shape, hw, tp = self.shape, self.hardware, self.tensor_parallel
        rows = requests * (2 * n - 1 + groups * (n - 1))
        bandwidth = hw.bandwidth * hw.bandwidth_efficiency * tp
        flops = hw.flops * hw.flops_efficiency * tp
        moved = shape.params * shape.bytes_per_value + requests * self.context * shape.kv_bytes
        done = 2.0 * shape.params * rows + 2.0 * self.context * rows * 2 * shape.num_hidden_layers * shape.heads[0]
        fixed = hw.step_ms
        if n > 1:
            fixed += hw.isd_ms
            moved += shape.lora_params(self.rank) * shape.bytes_per_value
            fixed += self._lora_ms(requests * (n - 1) * (1 + groups))
            moved += 3.0 * requests * (n - 1) * shape.vocab_size * shape.bytes_per_value  # q: written, read twice
        if groups:  # their attention is a kernel of its own, which reads keys and values again
            moved += requests * self.context * shape.kv_bytes
        return (moved / bandwidth + done / flops) * 1e3 + fixed + self._allreduce_ms(rows)

    def _lora_ms(self, rows: int) -> float:
        """Products of the adapter at mask slots."""
        rate = self.hardware.flops * (self.hardware.lora_efficiency or self.hardware.flops_efficiency)
        return 2e3 * self.shape.lora_params(self.rank) * rows / (rate * self.tensor_parallel)

    def _allreduce_ms(self, rows: int) -> float:
        if self.tensor_parallel == 1:
            return 0.0
        sent = 2 * rows * self.shape.hidden_size * self.shape.bytes_per_value / self.hardware.link
        return 2 * self.shape.num_hidden_layers * (self.hardware.allreduce_us * 1e-3 + sent * 1e3)

    def point(self, requests: int, n: int, acceptance: Sequence[float], groups: int = 0) -> dict[str, float]:
        """Step time, OH, TPF, tokens/s of all requests, and the speed-up over plain decoding."""
        ms, plain = self.step_ms(requests, n, groups), self.step_ms(requests, 1)
        tokens = tpf(acceptance[: n - 1], groups)
        return {
            "requests": requests, "n": n, "groups": groups, "ms": ms, "OH": ms / plain, "TPF": tokens,
            "tokens_per_s": requests * tokens / ms * 1e3, "speedup": tokens * plain / ms,
        }  # fmt: skip

    def best(self, requests: int, acceptance: Sequence[float], extra: bool = False) -> dict[str, float]:
        """The fastest stride, plain decoding (n = 1) among them. acceptance: as many drafts as may be tried.

        extra: with the number of extra groups that is fastest, else with none.
        """
        tried = [(n, g) for n in range(1, len(acceptance) + 2) for g in range(n if extra else 1)]
        return max((self.point(requests, n, acceptance, g) for n, g in tried), key=lambda p: p["tokens_per_s"])

    def schedule(self, acceptance: Sequence[float], most: int = 512) -> list[list[int | None]]:
        """`best` by number of requests, as the setting `schedule` takes it."""
        found: list[list[int | None]] = []
        for requests in range(1, most + 1):
            n = int(self.best(requests, acceptance)["n"])
            if not found or found[-1][2] != n:
                found.append([requests, requests, n])
            found[-1][1] = requests
        found[-1][1] = None
        return found

    def memory(self, requests: int, n: int) -> dict[str, float]:
        """Bytes a device holds: weights, keys and values, proposals, adapter."""
        shape, tp = self.shape, self.tensor_parallel
        weights = (shape.params + shape.hidden_size * shape.vocab_size) * shape.bytes_per_value / tp
        return {
            "weights": weights,
            "kv": requests * self.context * shape.kv_bytes / tp,
            "proposals": requests * (n - 1) * shape.vocab_size * shape.bytes_per_value,
            "adapter": shape.lora_params(self.rank) * shape.bytes_per_value / tp,
        }


def hardware(name: str) -> Hardware:
    """A file of `configs/hardware/` by its name, or any file by its path. Raises PlanError."""
    folder = Path(str(files("vllm_idlm.configs"))) / "hardware"
    path = Path(name) if Path(name).is_file() else folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise PlanError(f"hardware {name!r}: neither a file nor one of {known}")
    try:
        return Hardware(**yaml.safe_load(path.read_text(encoding="utf-8")))
    except (ValidationError, TypeError, yaml.YAMLError) as error:
        raise PlanError(f"{path}: {error}") from None


SHAPES: dict[str, dict[str, Any]] = {  # of models that need not be downloaded to be planned for
    "qwen3-8b": {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    },
    "qwen3-32b": {
        "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    },
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152,
    },
}  # fmt: skip
ZOO = {
    "idlm-8b": "qwen3-8b",
    "qwen3-8b-risd": "qwen3-8b",
    "idlm-32b": "qwen3-32b",
    "smollm2-135m-risd": "smollm2-135m",
}


def shape(model: str) -> Shape:
    """The sizes of a zoo model, a name of `SHAPES`, or a folder with a config.json. Raises PlanError."""
    import json

    name = ZOO.get(model, model)
    if name in SHAPES:
        return Shape(**SHAPES[name])
    file = Path(model) / "config.json"
    if not file.is_file():
        raise PlanError(f"model {model!r}: neither a folder with a config.json nor one of {', '.join([*ZOO, *SHAPES])}")
    try:
        return Shape(**json.loads(file.read_text(encoding="utf-8")))
    except (ValidationError, json.JSONDecodeError) as error:
        raise PlanError(f"{file}: not the sizes of a dense decoder: {error}") from None
