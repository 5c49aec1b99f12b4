"""The model zoo: a short name stands for a model, its mask token, its gated adapter and the engine settings it needs.

Entries are the YAML files in `configs/`, and in the folder $VLLM_IDLM_CONFIGS, which is searched first. A name works
wherever vLLM takes a model. Importing this file imports neither torch nor vLLM.
"""

from __future__ import annotations

import difflib
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator

EMBEDDED = "embedded:"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


class ZooError(ValueError):
    """An unknown name, or a zoo file that says something wrong: the message gives file, field, value and fix."""


class ZooEntry(BaseModel):
    """One model of the zoo, as its YAML file states it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="The zoo name, the same as the file's: lower-case letters, digits, dots, dashes.")
    description: str = Field(description="One line for `idlm models`: what it is and what it needs.")
    model: str = Field(description="Hub id, a folder (./ from this file, / or ~), or embedded:smollm2-135m-instruct.")
    mask_token_id: int = Field(ge=0, description="Id of the token that the model or adapter was trained to fill in.")
    n: int = Field(4, ge=2, le=16, description="Default stride: the most tokens one forward can yield.")
    lora: str | None = Field(
        None, description="Gated draft adapter (R-ISD): hub id, or a folder (./ from this file, / or ~)."
    )
    engine: dict[str, Any] = Field(
        default_factory=dict,
        description="Fields of vLLM's EngineArgs that this model needs, such as dtype; the user's own flags win.",
    )
    license: str | None = Field(None, description="Licence of the weights (SPDX), where their source states one.")
    source: str = Field(description="Where weights and adapter come from.")
    _folder: Path = PrivateAttr(default_factory=Path)

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError("allowed are lower-case letters, digits, dot, dash and underscore")
        return name

    @field_validator("model")
    @classmethod
    def _known_embedded(cls, model: str) -> str:
        if model.startswith(EMBEDDED) and model != f"{EMBEDDED}smollm2-135m-instruct":
            raise ValueError(f"the only embedded model is {EMBEDDED}smollm2-135m-instruct")
        return model

    def model_path(self) -> str:
        """What vLLM is given as its model: a hub id or a folder. The embedded model is made first if it must be."""
        if self.model.startswith(EMBEDDED):
            from vllm_idlm import embedded

            return str(embedded.ensure())
        return self._located("model", self.model)

    def lora_path(self) -> str | None:
        """Hub id or folder of the gated adapter, None without one."""
        return None if self.lora is None else self._located("lora", self.lora)

    def engine_defaults(self) -> dict[str, Any]:
        """Settings for vLLM's EngineArgs, to stand under what the user gave."""
        return dict(self.engine)

    def _located(self, field: str, value: str) -> str:
        """`value` as a folder, from the zoo file's, if it is written as one (./ ../ / ~); else as it is: a hub id."""
        if not value.startswith(("./", "../", "/", "~")):
            return value
        folder = (self._folder / Path(value).expanduser()).resolve()
        if not folder.is_dir():
            raise ZooError(f"zoo entry {self.name!r}: {field}: {value!r}: {folder} is no folder; correct the path")
        return str(folder)


def folders() -> list[Path]:
    """Where zoo files are looked for, first to last: $VLLM_IDLM_CONFIGS if set, then the entries of this package."""
    own = os.environ.get("VLLM_IDLM_CONFIGS")
    shipped = Path(str(files("vllm_idlm.configs")))
    if not own:
        return [shipped]
    folder = Path(own).expanduser()
    if not folder.is_dir():
        raise ZooError(f"VLLM_IDLM_CONFIGS={own!r} is no folder; set it to a folder of zoo files (*.yaml) or unset it")
    return [folder, shipped]


def _files() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in folders():
        for file in sorted(folder.glob("*.yaml")):
            found.setdefault(file.stem, file)
    return found


def names() -> list[str]:
    """Every name of the zoo, sorted."""
    return sorted(_files())


def load(name: str) -> ZooEntry:
    """The entry called `name`. Raises ZooError for an unknown name (with the nearest ones) and for a wrong file."""
    found = _files()
    if name not in found:
        near = difflib.get_close_matches(name, found, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`idlm models` lists them."
        raise ZooError(f"{name!r} is not in the model zoo; allowed are {', '.join(sorted(found))}; {hint}")
    return _read(found[name])


def resolve(model: str) -> ZooEntry | None:
    """The entry that `model` names, or None: no zoo name, or something of that name lies here and is meant."""
    if not isinstance(model, str) or not _NAME.fullmatch(model) or Path(model).exists():
        return None
    found = _files()
    return _read(found[model]) if model in found else None


def _read(file: Path) -> ZooEntry:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ZooError(f"{file} cannot be read as YAML: {error}") from None
    if not isinstance(content, dict):
        raise ZooError(f"{file} holds no mapping; its fields are {', '.join(ZooEntry.model_fields)}")
    try:
        entry = ZooEntry(**content)
    except (ValidationError, TypeError) as error:
        raise ZooError(_refusal(file, content, error)) from None
    if entry.name != file.stem:
        raise ZooError(f"{file}: name: {entry.name!r} must be the file's own, {file.stem!r}")
    entry._folder = file.resolve().parent
    return entry


def _refusal(file: Path, content: dict, error: ValidationError | TypeError) -> str:
    if isinstance(error, TypeError):  # a field name that is no string
        return f"{file}: field names must be strings, given {list(content)!r}"
    lines = []
    for item in error.errors():
        name = str(item["loc"][0])
        if item["type"] == "extra_forbidden":
            lines.append(f"{name}: no such field; allowed are {', '.join(ZooEntry.model_fields)}")
        elif item["type"] == "missing":
            lines.append(f"{name}: missing. {ZooEntry.model_fields[name].description}")
        else:
            lines.append(f"{name}: {content.get(name)!r}: {item['msg']}. {ZooEntry.model_fields[name].description}")
    return f"{file}: " + "; ".join(lines)
