"""The configuration of `idlm bench`: one YAML file, each field overridable as key=value on the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from vllm_idlm import yaml_config
from vllm_idlm.yaml_config import ConfigError

__all__ = ["Bench", "ConfigError", "Method", "load"]

PRESETS: dict[str, dict[str, Any]] = {  # speculative_config of a method that is named and nothing more
    "ngram": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2},
    "suffix": {"method": "suffix", "num_speculative_tokens": 8},
}
NEED_A_MODEL = ("eagle", "eagle3", "dflash", "draft_model")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Method(_Strict):
    """A way to decode: a name, vLLM's speculative_config (none: plain decoding), settings of its engine alone."""

    name: str = Field(pattern=r"^[\w.:-]+$", description="What it is called in the report.")
    speculative: dict[str, Any] | None = Field(None, description="vLLM's speculative_config; none: plain decoding.")
    engine: dict[str, Any] = Field({}, description="Arguments of vllm.LLM for this method, over `engine`.")

    @property
    def isd(self) -> bool:
        """Whether it is ISD."""
        return (self.speculative or {}).get("method") == "isd"

    @property
    def fixed_rows(self) -> tuple[int, int] | None:
        """Stride and extra groups of ISD with rows that are always the same; None for any other method."""
        found = self.speculative or {}
        if not self.isd or found.get("schedule") or found.get("coverage") not in ("last", "all"):
            return None
        n = found.get("n", 4)
        return n, n - 1 if found["coverage"] == "all" else 0


def method(given: Any) -> Any:
    """A method from its name alone (plain, isd, isd-8, ngram, suffix), or from a mapping as it stands."""
    if not isinstance(given, str):
        return given
    if given == "plain":
        return {"name": given}
    if stride := re.fullmatch(r"isd(?:-(\d+))?", given):
        return {"name": given, "speculative": {"method": "isd", "n": int(stride[1] or 4)}}
    if given in PRESETS:
        return {"name": given, "speculative": PRESETS[given]}
    if given in NEED_A_MODEL:
        raise ValueError(
            f"{given} needs its draft model: write {{name: {given}, speculative: {{method: {given}, model: FOLDER or "
            "hub id, num_speculative_tokens: 3}}"
        )
    known = ", ".join(["plain", "isd", "isd-N", *PRESETS])
    raise ValueError(f"{given!r} is no method known by name; known are {known}, or give {{name: .., speculative: ..}}")


class Bench(_Strict):
    """A comparison. The first method is the one that the others are compared with."""

    model: str = Field(description="Zoo name, hub id or folder of the served model.")
    out: str = Field(description="Folder of the report, its plots, the rounds measured so far, and the engines' logs.")
    engine: dict[str, Any] = Field({}, description="Arguments of vllm.LLM for every method.")
    methods: list[Method] = Field(min_length=1, description="Names, or name and speculative_config; plain comes first.")
    alive: int | None = Field(
        None, ge=2, description="Engines held at a time (default: all); the first method is in every group of so many."
    )

    prompts: str = Field(
        "held-out", description="held-out (of `idlm data`'s recipe), or a .txt, .jsonl, .parquet file."
    )
    concurrency: list[int] = Field([1, 4, 16], min_length=1, description="Requests under way at a time.")
    requests: int = Field(4, ge=1, description="Requests of a round, or as many as are under way if that is more.")
    temperatures: list[float] = Field([0.0, 1.0], min_length=1, description="0 is greedy.")
    max_tokens: int = Field(96, ge=2, description="Tokens of an answer.")
    fixed_length: bool = Field(True, description="Whether answers run to max_tokens; else they stop where they end.")
    rounds: int = Field(3, ge=1, description="Repetitions, the methods in turn in each, with other prompts in each.")
    warm_up_tokens: int = Field(24, ge=2, description="Tokens of a warm-up answer, at each concurrency; not measured.")
    seed: int = Field(0, ge=0, description="Of every engine, and of the order of prompts.")
    start_minutes: float = Field(20, gt=0, description="An engine that takes longer to start has failed.")
    round_minutes: float = Field(10, gt=0, description="A round that takes longer has failed.")

    @field_validator("methods", mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        return [method(item) for item in given] if isinstance(given, list) else given

    @field_validator("concurrency", "temperatures")
    @classmethod
    def _allowed(cls, given: list[float]) -> list[float]:
        if len(set(given)) < len(given) or min(given) < 0 or (isinstance(given[0], int) and min(given) < 1):
            raise ValueError(f"give different numbers (temperatures from 0, concurrency from 1 on); they are {given}")
        return given

    @model_validator(mode="after")
    def _fits(self) -> Bench:
        names = [m.name for m in self.methods]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"methods: {', '.join(sorted(twice))} is there twice; give each a name of its own")
        seats = self.engine.get("max_num_seqs")
        if seats is not None and max(self.concurrency) > seats:
            raise ValueError(
                f"concurrency {max(self.concurrency)} is more than engine.max_num_seqs {seats}; raise the latter"
            )
        return self

    def wanted(self, concurrency: int) -> int:
        """Requests of a round at that concurrency."""
        return max(self.requests, concurrency)

    def groups(self) -> list[list[Method]]:
        """Methods whose engines are held together: all, or `alive` at a time with the first in each group."""
        first, others = self.methods[0], list(self.methods[1:])
        size = len(others) if self.alive is None else self.alive - 1
        return [[first, *others[i : i + size]] for i in range(0, len(others), size)] if others else [[first]]


def load(file: str | Path, overrides: Iterable[str] = ()) -> Bench:
    """The configuration in a YAML file with overrides; relative paths are from the working folder. ConfigError."""
    return yaml_config.load(Bench, file, overrides)
