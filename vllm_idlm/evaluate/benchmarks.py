"""What a benchmark is: which tasks, from which data, with which sampling. One YAML file each, in `configs/eval/`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class EvalError(ValueError):
    """An evaluation that cannot be run as asked: the message names the setting, what is allowed and the fix."""


class Benchmark(BaseModel):
    """A benchmark. Sampling that is not given is the task's own (lm_eval) or the server's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="The file's own name.")
    description: str = Field(description="What it is, how many problems, what is counted as right.")
    kind: Literal["lm_eval", "humaneval", "mbpp", "livecodebench", "choices", "math", "reasoning_gym"] = Field(
        description="lm_eval: tasks of the harness. The others are tasks made here and run by the harness."
    )
    tasks: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="lm_eval: its task names; reasoning_gym: its tasks and their settings."
    )
    metric: str = Field("correct", description="The harness's metric that is 1 for a right answer and 0 for a wrong.")
    filter: str | None = Field(None, description="The harness's filter that takes the answer out of the text.")
    data: str | None = Field(None, description="Hub data set, 'package' (comes with a Python package), or a folder.")
    subset: str | None = Field(None, description="Configuration of the hub data set.")
    split: str = Field("test", description="Split of it.")
    fields: dict[str, str] = Field(default_factory=dict, description="choices, math: columns named otherwise.")
    thinking: bool | None = Field(None, description="Thinking mode of the chat template (enable_thinking).")
    think_end: str = Field("</think>", description="What ends the thoughts; the answer is what comes behind it.")
    system: str | None = Field(None, description="System message.")
    temperature: float | None = Field(None, ge=0, description="0 is greedy.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    max_tokens: int | None = Field(None, ge=1, description="Most tokens of an answer, thoughts included.")
    stop: list[str] | None = Field(
        None, max_length=4, description="Stop strings instead of the task's own (servers take four); [] for none."
    )
    samples: int = Field(1, ge=1, description="Answers to each problem; accuracy is the mean over them.")
    problems: int | None = Field(None, ge=1, description="reasoning_gym: problems of each task.")
    seed: int = Field(0, ge=0, description="Of procedural problems.")
    source: str = Field(description="Where the settings come from.")

    @model_validator(mode="after")
    def _complete(self) -> Benchmark:
        if self.kind in ("lm_eval", "reasoning_gym") and not self.tasks:
            raise ValueError(f"kind {self.kind} needs tasks")
        if self.kind in ("mbpp", "livecodebench", "choices", "math") and not self.data:
            raise ValueError(f"kind {self.kind} needs data: a hub data set or a folder")
        if self.kind == "reasoning_gym" and not self.problems:
            raise ValueError("kind reasoning_gym needs problems: how many of each task")
        return self

    def sampling(self) -> dict[str, Any]:
        """What is given of it, as the server's API names it."""
        given = {"top_p": self.top_p, "top_k": self.top_k, "max_tokens": self.max_tokens, "stop": self.stop}
        return {name: value for name, value in given.items() if value is not None}


def folder() -> Path:
    """Where the shipped benchmarks are."""
    return Path(str(files("vllm_idlm.configs"))) / "eval"


def names() -> list[str]:
    """The shipped benchmarks."""
    return sorted(p.stem for p in folder().glob("*.yaml"))


def load(name: str, **changes: Any) -> Benchmark:
    """A shipped benchmark by its name or any file by its path, with settings changed. Raises EvalError."""
    path = Path(name) if Path(name).suffix in (".yaml", ".yml") else folder() / f"{name}.yaml"
    if not path.is_file():
        raise EvalError(f"benchmark {name!r}: neither a YAML file nor one of {', '.join(names())}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Benchmark(**{**content, **{key: value for key, value in changes.items() if value is not None}})
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}" for e in error.errors())
        raise EvalError(f"{path.name}: {told}") from None
    except (TypeError, yaml.YAMLError) as error:
        raise EvalError(f"{path.name}: not a benchmark: {error}") from None
