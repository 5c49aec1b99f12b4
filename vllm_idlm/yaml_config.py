"""A pydantic model from a YAML file with `key=value` overrides, and messages that name field, value and fix."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError


class ConfigError(ValueError):
    """A wrong configuration: the message names field, value, what is allowed and the fix."""


Model = TypeVar("Model", bound=BaseModel)


def load(model: type[Model], file: str | Path, overrides: Iterable[str] = ()) -> Model:
    """`model` from a YAML file with `key=value` overrides (values as YAML; a.b=1 goes into a mapping).

    Raises ConfigError.
    """
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read as YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds no mapping; its fields are {', '.join(model.model_fields)}")
    for item in overrides:
        override(content, item)
    try:
        return model(**content)
    except ValidationError as error:
        raise ConfigError(f"{file}: " + "; ".join(_says(model, item) for item in error.errors())) from None


def override(content: dict[str, Any], item: str) -> None:
    """Put `key=value` into `content`. Raises ConfigError."""
    key, sign, value = item.partition("=")
    if not sign:
        raise ConfigError(
            f"{item!r} is no override; write key=value, for example out=runs/mine or engine.dtype=float32"
        )
    *path, last = key.split(".")
    for name in path:
        content = content.setdefault(name, {})
        if not isinstance(content, dict):
            raise ConfigError(f"{item!r}: {name} is no mapping")
    try:
        content[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{item!r}: the value is no YAML: {error}") from None


def _says(model: type[BaseModel], item: Any) -> str:
    where = ".".join(map(str, item["loc"])) or "configuration"
    if item["type"] == "extra_forbidden":
        return f"{where} is no field; allowed are {', '.join(model.model_fields)}"
    field = model.model_fields.get(str(item["loc"][0])) if item["loc"] else None
    about = f" {field.description}" if field and field.description else ""
    return f"{where}: {item.get('input')!r} is not allowed: {item['msg']}.{about}"
