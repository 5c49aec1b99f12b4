"""The configuration of a training run: one YAML file, each field overridable as key=value on the command line."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from vllm_idlm import yaml_config
from vllm_idlm.training.losses import check_names
from vllm_idlm.yaml_config import ConfigError

__all__ = ["Adapter", "Config", "ConfigError", "Stage", "load"]

_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Adapter(_Strict):
    """The gated LoRA adapter (form: gated)."""

    rank: int = Field(32, ge=1, le=512, description="Rank of each update.")
    alpha: float = Field(64, gt=0, description="Scale: an update is alpha / rank * B A x.")
    targets: list[str] = Field(
        _LINEAR,
        min_length=1,
        description=f"Linear layers that are given an update, of {', '.join(_LINEAR)}.",
    )
    init: str | None = Field(None, description="Folder of an adapter to go on from (its rank and targets are taken).")

    @field_validator("targets")
    @classmethod
    def _known_targets(cls, targets: list[str]) -> list[str]:
        if odd := [name for name in targets if name not in _LINEAR]:
            raise ValueError(f"{', '.join(odd)} cannot be trained; allowed are {', '.join(_LINEAR)}")
        return targets

    @property
    def start(self) -> str | None:
        """`init` as a folder: from the working folder, else from the package's configs; as it is if neither has it."""
        shipped = None if self.init is None else Path(str(files("vllm_idlm.configs"))) / self.init
        return str(shipped) if shipped and not Path(self.init).is_dir() and shipped.is_dir() else self.init


class Stage(_Strict):
    """One stage of the block size curriculum."""

    stride: int = Field(ge=2, le=16, description="Stride n: blocks have n - 1 masks.")
    until: float = Field(gt=0, le=1, description="Share of the steps at which the stage ends; the last ends at 1.")


class Config(_Strict):
    """A training run."""

    model: str = Field(description="Zoo name, hub id or folder of the base model.")
    out: str = Field(description="Folder for the adapter (or checkpoint), its records and the run's checkpoints.")
    form: Literal["gated", "full"] = Field("gated", description="gated: LoRA at mask slots only; full: all weights.")
    mask_token_id: int | None = Field(None, ge=0, description="Default: the zoo entry's.")
    stages: list[Stage] = Field(
        [Stage(stride=4, until=1.0)], description="Block size curriculum: stride by share of the steps done."
    )
    adapter: Adapter = Adapter()

    data: list[str] = Field(min_length=1, description="Folders or files of samples (see `idlm data`).")
    eval_data: list[str] | None = Field(None, description="Held-out samples; default: the eval split of `data`.")
    eval_samples: int = Field(32, ge=1, description="Held-out samples an evaluation uses.")
    max_tokens: int = Field(512, ge=16, description="Longest sample in tokens; answers beyond it are cut.")
    row_tokens: int = Field(512, ge=16, description="Tokens of a packed row.")
    rows: int = Field(2, ge=1, description="Packed rows of one forward, on one device.")
    accumulate: int = Field(1, ge=1, description="Forwards of one optimizer step.")
    tilings: int = Field(1, ge=1, description="Block tilings laid over a sample; 1 is the paper's, stride-1 is all.")

    loss: dict[str, float] = Field({"kl": 1.0, "tv": 1.0}, description="Weights of the losses ce, kl, tv.")
    depth_weights: list[float] = Field([1.0], min_length=1, description="Weight by place in the block; last repeats.")
    clean_weight: float | Literal["auto"] = Field(
        "auto", description="Full form: s in CE_masked + s CE_clean; auto: the detached ratio of the two losses."
    )

    steps: int = Field(ge=1, description="Optimizer steps of the whole run.")
    lr: float = Field(1e-3, gt=0, description="Peak learning rate.")
    min_lr: float = Field(0.03, ge=0, le=1, description="Learning rate at the end, as a share of the peak.")
    warmup: float = Field(0.03, ge=0, lt=1, description="Share of the steps over which the rate rises.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's betas.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    clip: float = Field(1.0, gt=0, description="Largest gradient norm.")

    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Of the model's weights and activations.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in backward: less memory.")
    seed: int = Field(0, description="Of data order, blocks and the adapter's start.")
    eval_every: int = Field(100, ge=1, description="Steps between evaluations.")
    save_every: int = Field(100, ge=1, description="Steps between checkpoints.")
    stop_minutes: float | None = Field(None, gt=0, description="Save and stop after this time; run again to go on.")
    trackers: list[Literal["tensorboard", "wandb"]] = Field([], description="Where metrics are sent as well.")

    @field_validator("loss")
    @classmethod
    def _known_losses(cls, loss: dict[str, float]) -> dict[str, float]:
        check_names(loss)
        return loss

    @field_validator("depth_weights")
    @classmethod
    def _some_depth_counts(cls, weights: list[float]) -> list[float]:
        if min(weights) < 0 or not any(weights):
            raise ValueError(f"weights must be 0 or more, and one of them more; they are {weights}")
        return weights

    @field_validator("stages")
    @classmethod
    def _stages_in_order(cls, stages: list[Stage]) -> list[Stage]:
        ends = [stage.until for stage in stages]
        if not ends or ends != sorted(set(ends)) or ends[-1] != 1.0:
            raise ValueError(f"until must rise and end at 1.0; it is {ends}")
        return stages

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.max_tokens > self.row_tokens:
            raise ValueError(
                f"max_tokens {self.max_tokens} is more than row_tokens {self.row_tokens}; raise the latter"
            )
        if self.form == "full" and set(self.loss) != {"ce"}:
            raise ValueError(f"loss {self.loss}: the full form trains ce alone (the base that kl and tv need changes)")
        return self

    @property
    def stride(self) -> int:
        """The largest stride that is trained."""
        return max(stage.stride for stage in self.stages)

    def stride_at(self, step: int) -> int:
        """The stride of a step, from 0."""
        return next(stage.stride for stage in self.stages if step < stage.until * self.steps)


def load(file: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The configuration in a YAML file with `key=value` overrides (values as YAML; a.b=1 goes into a mapping).

    Relative paths are taken from the working folder. Raises ConfigError.
    """
    return yaml_config.load(Config, file, overrides)
