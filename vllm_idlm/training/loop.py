"""The training run: resumable to the bit, on one device or on several through accelerate.

A step's data is a function of seed and step (`stream`), the state is weights, optimizer, schedule and random states
(accelerate's `save_state`), so an interrupted run goes on as if it had not been interrupted.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_idlm.fingerprint import fingerprint
from vllm_idlm.training import acceptance, card, export, forward
from vllm_idlm.training.config import Config, ConfigError
from vllm_idlm.training.layout import Sample
from vllm_idlm.training.objective import Objective, Sums
from vllm_idlm.training.stream import Stream

STATE = "state"  # checkpoints are OUT/state-STEP
METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Base:
    """The base model of a run."""

    name: str  # as the user knows it
    folder: str
    mask_token_id: int


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
        from accelerate import Accelerator
        from accelerate.utils import set_seed

        set_seed(config.seed)
        self.config, self.base, self.report = config, base, report
        self.out = Path(config.out)
        mixed = "bf16" if config.dtype == "bfloat16" else "no"
        self.accelerator = Accelerator(mixed_precision=mixed, log_with=config.trackers or None, project_dir=config.out)
        self.model = build(config, base)
        self.held = list(held)[: config.eval_samples]
        self.step, self.mask_tokens, self.seconds = 0, 0, 0.0
        self._prepare(train)

    def _prepare(self, train: Sequence[Sample]) -> None:
        config, acc = self.config, self.accelerator
        learnt = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learnt, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        objective = Objective(self.model, config, self.base.mask_token_id)
        self.objective, self.optimizer = acc.prepare(objective, optimizer)
        self.schedule = schedule  # a step of ours is a step of it, on any number of devices
        acc.register_for_checkpointing(self.schedule, _Counters(self))
        acc.register_save_state_pre_hook(self._only_learnt)
        acc.register_load_state_pre_hook(self._load_learnt)
        self.stream = Stream(train, config, acc.process_index, acc.num_processes)
        if config.trackers:
            acc.init_trackers("vllm-idlm", config.model_dump(mode="json"))

    def _rate(self, step: int) -> float:
        """Learning rate as a share of the peak: a linear rise, then half a cosine down to min_lr."""
        config = self.config
        rise = max(1, round(config.warmup * config.steps))
        if step < rise:
            return (step + 1) / rise
        done = (step - rise) / max(1, config.steps - rise)
        return config.min_lr + (1 - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    # -- checkpoints

    def _only_learnt(self, models: list, weights: list[dict], folder: str) -> None:
        """Frozen weights are not saved: they are the base's."""
        for i, state in enumerate(weights):
            own = self.accelerator.unwrap_model(models[i])
            learnt = {name for name, p in own.named_parameters() if p.requires_grad}
            weights[i] = {name: tensor for name, tensor in state.items() if name in learnt}
            if self.config.form == "gated":
                torch.save(weights[i], Path(folder) / f"learnt-{i}.pt")
        if self.config.form == "gated":
            weights.clear()

    def _load_learnt(self, models: list, folder: str) -> None:
        if self.config.form != "gated":
            return
        for i, model in enumerate(models):
            state = torch.load(Path(folder) / f"learnt-{i}.pt", map_location="cpu", weights_only=True)
            self.accelerator.unwrap_model(model).load_state_dict(state, strict=False)
        models.clear()

    def save(self) -> None:
        """A checkpoint of this step; earlier ones go."""
        acc, target = self.accelerator, self.out / f"{STATE}-{self.step:07d}"
        scratch = target.with_name(f".{target.name}")
        acc.wait_for_everyone()
        acc.save_state(str(scratch), safe_serialization=False)
        if acc.is_main_process:
            (self.out / "config.json").write_text(self.config.model_dump_json(indent=1))
            scratch.rename(target)
            for old in checkpoints(self.out):
                if old != target:
                    shutil.rmtree(old)
        acc.wait_for_everyone()
        self.report("saved", {"step": self.step, "path": str(target)})

    def resume(self) -> bool:
        """Go on from the run's last checkpoint; False if there is none. ConfigError if it is another run's."""
        found = checkpoints(self.out)
        if not found:
            return False
        check_same(self.config, self.out)
        self.accelerator.load_state(str(found[-1]))
        return True

    # -- training

    def train(self) -> bool:
        """Train to the end, or until `stop_minutes` have passed; True if the run is complete."""
        self.out.mkdir(parents=True, exist_ok=True)
        began, before = time.monotonic(), self.seconds
        if self.step == 0:
            self.evaluate()
        for batches in self.stream.steps(self.step):
            self._step(batches)
            self.seconds = before + time.monotonic() - began
            stop = self.config.stop_minutes is not None and time.monotonic() - began > 60 * self.config.stop_minutes
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

    def _step(self, batches: list) -> None:
        began, acc = time.monotonic(), self.accelerator
        measured: Sums | None = None
        self.objective.train()
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            with acc.autocast(), _synchronised(acc, self.objective, last):
                loss = self.objective(batch.to(acc.device)) / len(batches)
                acc.backward(loss)
            found = acc.unwrap_model(self.objective).last
            measured = found if measured is None else measured + found
        norm = acc.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], self.config.clip)
        rate = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.step += 1
        values = measured.means()
        trained = values["mask_tokens"] * acc.num_processes
        self.mask_tokens += trained
        speed = trained / (time.monotonic() - began)
        values |= {"loss": float(loss.detach()) * len(batches), "norm": float(norm), "lr": rate, "speed": speed}
        self._note("step", values)

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Held-out alpha by depth and the forecast of TPF, at temperature 1, with the largest stride."""
        if not self.held:
            return {}
        self.objective.eval()
        masks = self.config.stride - 1
        with self.accelerator.autocast():
            measured = list(acceptance.rates(self.model, self.held, masks, self.base.mask_token_id, (1.0,)))
        chain = acceptance.forecast(measured, 1.0, masks)
        figures = {"alpha": acceptance.overlaps(measured, 1.0, masks), **chain.table()}
        self._note("eval", figures)
        return figures

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
        print_of = fingerprint(self.base.folder)
        content = export.record(self.config, self.base.mask_token_id, self.base.name, print_of, self.step, found)
        if self.accelerator.is_main_process:
            export.save(self.model, target, content, self.base.folder)
            card.write(target, content, self.out / METRICS)
        return target


class _Counters:
    """What a run counts, in the form that accelerate saves."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.run.step, "mask_tokens": self.run.mask_tokens, "seconds": self.run.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.run.step, self.run.mask_tokens, self.run.seconds = state["step"], state["mask_tokens"], state["seconds"]


def _synchronised(accelerator: Any, module: Any, last: bool):
    """Gradients are exchanged between devices in a step's last backward only."""
    return contextlib.nullcontext() if last else accelerator.no_sync(module)


def build(config: Config, base: Base) -> Any:
    """The model to train: the base with a new or a given adapter around it, or the base itself."""
    dtype = getattr(torch, config.dtype)
    if config.form == "full":
        model = forward.load(base.folder, dtype=torch.float32)  # master weights; autocast works in config.dtype
    else:
        model = _with_adapter(forward.load(base.folder, dtype), config)
    if not 0 <= base.mask_token_id < model.config.vocab_size:
        raise ConfigError(
            f"mask_token_id: {base.mask_token_id} is outside the vocabulary of {base.name}: allowed are "
            f"0..{model.config.vocab_size - 1}"
        )
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if config.form == "gated":
            model.enable_input_require_grads()
    return model


def _with_adapter(model: Any, config: Config) -> Any:
    from peft import LoraConfig, PeftModel, get_peft_model

    model.requires_grad_(False)
    if config.adapter.init:
        return PeftModel.from_pretrained(model, config.adapter.init, is_trainable=True)
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


def checkpoints(out: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted(out.glob(f"{STATE}-*"))


def check_same(config: Config, out: Path) -> None:
    """ConfigError if the checkpoints in `out` were made with another configuration (but for where it stops)."""
    free = {"stop_minutes", "save_every", "eval_every", "trackers", "out"}
    before = json.loads((out / "config.json").read_text())
    now = config.model_dump(mode="json")
    for name, value in now.items():
        if name not in free and before.get(name) != value:
            raise ConfigError(
                f"{name}: {value!r}, but the checkpoint in {out} was made with {before.get(name)!r}. Fix: the old "
                "value to go on with that run, or another `out` for a new one"
            )
