"""The training run: resumable to the bit, on one device or on several through accelerate.

A step's data is a function of seed and step (`stream`), nothing in a step is random, and a checkpoint holds weights,
optimizer and schedule: an interrupted run goes on as if it had not been interrupted.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_idlm.training import acceptance, card, checkpoint, devices, export, forward, sharded
from vllm_idlm.training.config import Config, ConfigError
from vllm_idlm.training.layout import Sample
from vllm_idlm.training.objective import Objective, Sums
from vllm_idlm.training.stream import Stream

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Base:
    """The base model of a run."""

    name: str  # as the user knows it
    folder: str
    mask_token_id: int
    fingerprint: str


class Run:
    """One training run in this process.

    `report(event, values)` is called with "step" (values of the step), "eval" (held-out figures) and "saved".
    """

    def __init__(
        self,
        config: Config,
        base: Base,
        train: Sequence[Sample],
        held: Sequence[Sample],
        report: Callable[[str, dict[str, Any]], None] = lambda event, values: None,
    ) -> None:
        from accelerate.utils import set_seed

        set_seed(config.seed)
        self.config, self.base, self.report = config, base, report
        self.out = Path(config.out)
        self.accelerator = devices.accelerator(config)
        self.sharded = self.accelerator.is_fsdp2
        self.model = build(config, base)
        self.held = list(held)[: config.eval_samples]
        self.step, self.mask_tokens, self.seconds = 0, 0, 0.0
        self.figures: tuple[int, dict[str, Any]] = (-1, {})  # the last evaluation and its step
        self._prepare(train)

    def _prepare(self, train: Sequence[Sample]) -> None:
        config, acc = self.config, self.accelerator
        weights = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
        # A step of ours is a step of the schedule, on any number of devices: accelerate would count it once a device.
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        objective = Objective(self.model, config, self.base.mask_token_id, lambda value: acc.reduce(value, "mean"))
        objective._no_split_modules = self.model._no_split_modules  # by layer, where the model is shared out
        self.objective, self.optimizer = acc.prepare(objective, optimizer)
        self.stream = Stream(train, config, acc.process_index, acc.num_processes)
        world = f"{acc.num_processes} (FSDP)" if self.sharded else acc.num_processes
        self.identity = checkpoint.identity(config, self.base.fingerprint, train, world)
        if config.trackers:
            acc.init_trackers("vllm-idlm", _scalars(config.model_dump(mode="json")))

    def _rate(self, step: int) -> float:
        """Learning rate as a share of the peak: a linear rise, then half a cosine down to min_lr."""
        config = self.config
        rise = max(1, round(config.warmup * config.steps))
        if step < rise:
            return (step + 1) / rise
        done = (step - rise) / max(1, config.steps - rise)
        return config.min_lr + (1 - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    # -- checkpoints

    def save(self) -> None:
        """A checkpoint of this step; earlier ones go."""
        rest = {
            "schedule": self.schedule.state_dict(),
            "counts": {"step": self.step, "mask_tokens": self.mask_tokens, "seconds": self.seconds},
        }
        main, path = self.accelerator.is_main_process, None
        if self.sharded:
            scratch = checkpoint.scratch_of(self.out, self.step)
            sharded.write(scratch, self.objective, self.optimizer.optimizer, rest, main)
            path = checkpoint.take(scratch, self.identity) if main else None
        elif main:
            state = {"weights": checkpoint.learnt(self.model), "optimizer": self.optimizer.state_dict(), **rest}
            path = checkpoint.save(self.out, self.step, state, self.identity)
        if main:
            self.report("saved", {"step": self.step, "path": str(path)})
        self.accelerator.wait_for_everyone()

    def resume(self) -> bool:
        """Go on from the run's last checkpoint; False if there is none. ConfigError if it is another run's."""
        found = checkpoint.files(self.out)
        if not found:
            return False
        checkpoint.check(self.out, self.identity)
        if self.sharded:
            state = sharded.read(found[-1], self.objective, self.optimizer.optimizer)
        else:
            state = torch.load(found[-1], map_location="cpu", weights_only=True)
            checkpoint.put_back(self.model, state["weights"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.mask_tokens, self.seconds = (state["counts"][k] for k in ("step", "mask_tokens", "seconds"))
        return True

    # -- training

    def train(self) -> bool:
        """Train to the end, or until `stop_minutes` have passed; True if the run is complete."""
        self.out.mkdir(parents=True, exist_ok=True)
        self._forget_later()
        began, before = time.monotonic(), self.seconds
        if self.step == 0:
            self.evaluate()
        for batches in self.stream.steps(self.step):
            self._step(batches)
            self.seconds = before + time.monotonic() - began
            stop = self._time_is_up(time.monotonic() - began)
            last = self.step == self.config.steps
            if last or self.step % self.config.eval_every == 0:
                self.evaluate()
            if last or stop or self.step % self.config.save_every == 0:
                self.save()
            if stop and not last:
                break
        if self.config.trackers:
            self.accelerator.end_training()
        return self.step == self.config.steps

    def _time_is_up(self, seconds: float) -> bool:
        """Whether to stop, the same on every device: one clock could be a step ahead of another."""
        if self.config.stop_minutes is None:
            return False
        up = torch.tensor(float(seconds > 60 * self.config.stop_minutes), device=self.accelerator.device)
        return bool(self.accelerator.reduce(up, "sum") > 0)

    def _forget_later(self) -> None:
        """Drop what metrics.jsonl says of steps that an interruption lost."""
        file = self.out / METRICS
        if self.accelerator.is_main_process and file.exists():
            kept = [x for x in file.read_text().splitlines() if self.step and json.loads(x)["step"] <= self.step]
            file.write_text("".join(line + "\n" for line in kept))

    def _step(self, batches: list) -> None:
        began, acc = time.monotonic(), self.accelerator
        measured, loss = None, 0.0
        self.objective.train()
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            with acc.autocast(), devices.synchronised(acc, self.objective, last):
                part = self.objective(forward.padded(batch.to(acc.device), self.config.row_tokens)) / len(batches)
                acc.backward(part)
            loss += float(part.detach())
            found = acc.unwrap_model(self.objective).last
            measured = found if measured is None else measured + found
        norm = acc.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], self.config.clip)
        rate = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.step += 1
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        loss = float(acc.reduce(torch.tensor(loss, device=acc.device), "mean"))
        self._count(measured, {"loss": loss, "norm": float(norm), "lr": rate}, began)

    def _count(self, measured: Sums, values: dict[str, float], began: float) -> None:
        acc = self.accelerator
        means = measured.over(lambda sums: acc.reduce(sums.to(acc.device), "sum").cpu()).means()
        self.mask_tokens += means["mask_tokens"]
        self._note("step", {**means, **values, "speed": means["mask_tokens"] / (time.monotonic() - began)})

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Held-out alpha by depth and the forecast of TPF, at temperature 1, with the largest stride; once a step."""
        if not self.held or self.figures[0] == self.step:
            return self.figures[1]
        self.objective.eval()
        masks, mask = self.config.stride - 1, self.base.mask_token_id
        with self.accelerator.autocast():
            found = self.accelerator.unwrap_model(self.objective)
            measured = found(lambda model: list(acceptance.rates(model, self.held, masks, mask, (1.0,))))
        if self.sharded:
            self.objective.reshard()  # torch does it behind a backward only
        chain = acceptance.forecast(measured, 1.0, masks)
        self.figures = (self.step, {"alpha": acceptance.overlaps(measured, 1.0, masks), **chain.table()})
        self._note("eval", self.figures[1])
        return self.figures[1]

    def _note(self, event: str, values: dict[str, Any]) -> None:
        values = {"step": self.step, "mask_tokens_trained": self.mask_tokens, **values}
        if self.accelerator.is_main_process:
            with (self.out / METRICS).open("a") as file:
                file.write(json.dumps({"event": event, **values}) + "\n")
            self.report(event, values)
        if self.config.trackers:
            numbers = {f"{event}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
            self.accelerator.log(numbers, step=self.step)

    def export(self, folder: Path | None = None) -> Path:
        """The adapter or checkpoint, to `folder` (default OUT/final), with its record."""
        target = folder or self.out / "final"
        found = {"mask_tokens_trained": self.mask_tokens, "seconds": round(self.seconds), "held_out": self.evaluate()}
        content = export.record(self.config, self.model, self.base, self.step, found)
        main = self.accelerator.is_main_process
        weights = checkpoint.learnt(self.model)
        weights = sharded.whole(weights, main) if self.sharded else weights
        if main:
            export.save(self.model, weights, target, content, self.base.folder)
            card.write(target, content, self.out / METRICS)
        return target


def _scalars(values: dict[str, Any]) -> dict[str, Any]:
    """As trackers take them."""
    return {k: v if isinstance(v, int | float | str | bool) else json.dumps(v) for k, v in values.items()}


def build(config: Config, base: Base) -> Any:
    """The model to train: the base with a new or a given adapter around it, or the base itself."""
    dtype = getattr(torch, config.dtype)
    if config.form == "full":
        model = forward.load(base.folder, dtype=torch.float32)  # master weights; autocast works in config.dtype
    else:
        model = forward.load(base.folder, dtype).requires_grad_(False)
        model = with_adapter(model, config.adapter.start, True) if config.adapter.init else _new_adapter(model, config)
        _uncast(model)
    check_mask(base.mask_token_id, model, base.name)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if config.form == "gated":
            model.enable_input_require_grads()
    return model


def check_mask(mask_token_id: int, model: Any, name: str) -> None:
    """ConfigError if the mask token is none of the model's tokens."""
    if not 0 <= mask_token_id < model.config.vocab_size:
        raise ConfigError(
            f"mask_token_id: {mask_token_id} is outside the vocabulary of {name}: allowed are "
            f"0..{model.config.vocab_size - 1}"
        )


def with_adapter(model: Any, folder: str, learn: bool = False) -> Any:
    """The model with the adapter in `folder` around it; ConfigError if it does not fit."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, folder, is_trainable=learn)
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(f"adapter {folder} does not fit {model.config.name_or_path}: {str(error)[:300]}") from None


def _new_adapter(model: Any, config: Config) -> Any:
    from peft import LoraConfig, get_peft_model

    wanted = LoraConfig(
        r=config.adapter.rank,
        lora_alpha=config.adapter.alpha,
        target_modules=list(config.adapter.targets),
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, wanted)
    except ValueError as error:
        raise ConfigError(f"adapter.targets: {config.adapter.targets}: {error}") from None


def _uncast(model: Any) -> None:
    """Adapter layers take their input as it is: autocast brings the float32 weights to its dtype, once a step."""
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
