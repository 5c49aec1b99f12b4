"""The settings of ISD: what may stand beside `"method": "isd"` in vLLM's `speculative_config`.

`parse` turns what the user wrote into `ISDSettings` or refuses it with the setting, the value, what is allowed and the
fix. The settings travel to every process of vLLM as plain JSON in `VllmConfig.additional_config["isd"]`.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

METHOD = "isd"
_AUTO_SLOTS = 32  # of a row; the engine makes room for all requests to have it
KEY = "isd"  # the key of our settings in VllmConfig.additional_config

# Fields that vLLM or its CLI's split flags put into speculative_config, and what ISD says instead.
_NOT_OURS = {
    "model": 'ISD drafts with the served model itself; a gated adapter is given by "lora"',
    "num_speculative_tokens": 'say "n": the stride, one more than the drafts of a forward (or --spec-tokens n-1)',
}


class SettingsError(ValueError):
    """A wrong ISD setting: the message names it, its value, what is allowed and the fix."""


class ISDSettings(BaseModel):
    """Settings of introspective strided decoding."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    n: int = Field(4, ge=2, le=16, description="Stride: the most tokens one forward can yield; n - 1 mask slots draft.")
    mask_token_id: int | None = Field(
        None,
        ge=0,
        description="Id of the token in mask slots. Default: the zoo entry's, else the adapter's isd.json, else "
        "mask_token_id in the checkpoint's config.json.",
    )
    lora: str | None = Field(
        None,
        description="Folder or hub id of the gated LoRA adapter (peft format) active at mask slots only (R-ISD). "
        "Default: the zoo entry's; without one the served weights draft by themselves (a full I-DLM).",
    )
    draft_sampling: Literal["probabilistic", "greedy"] = Field(
        "probabilistic",
        description="How drafts are drawn for sampled requests: at its own temperature (on V1 its top-k and top-p "
        "too), or as the most probable token (then verified as a one-hot proposal, which is exact too).",
    )
    check_base: bool = Field(
        True,
        description="Whether an adapter that records another base model than the served one is refused. Turn it off to "
        "serve the same model in other weights, such as a quantised copy.",
    )
    verify: Literal["standard", "block"] = Field(
        "standard",
        description="Verification rule, both exact: standard speculative sampling, draft by draft, or block "
        "verification, which judges the drafts together and accepts a little more for more work (Model Runner V1).",
    )
    lossy_alpha: float = Field(
        1.0,
        gt=0,
        le=1,
        strict=False,
        description="Below 1 the output is NOT the model's own any more: sampled drafts are accepted with probability "
        "min(1, p / (alpha q)). Standard verification on Model Runner V1 only; greedy requests stay exact.",
    )
    coverage: Literal["auto", "last", "all"] | list[int] = Field(
        "auto",
        description="Which outcomes of a verify forward have mask slots waiting: the last (all drafts accepted; after "
        "a rejection a forward drafts without verifying), all (no such cold forwards, for n - 1 rows an outcome), the "
        "last and a list of others by the number of drafts accepted ([0, 1]), or auto: what measured acceptance and "
        "the measured time of rows make fastest, down to plain decoding (where extra outcomes cannot run: last).",
    )
    schedule: list[list[int | None]] | None = Field(
        None,
        description="Stride by the number of requests in a forward, as [first, last, stride] in order, the last with "
        "null for no end: [[1, 16, 4], [17, 64, 3], [65, null, 1]]. Stride 1 is plain decoding. Default: always n.",
    )

    cpu_linear: Literal["auto", "rows", "vllm"] = Field(
        "auto",
        description="Whose products of the model's weights run on CPUs: rows (ours: a few rows cost little more than "
        "one, and a row's result does not depend on the others), vllm (oneDNN), or auto: rows for bfloat16 on "
        "processors with AVX-512 but without instructions for bfloat16, where oneDNN is slow.",
    )

    @field_validator("schedule")
    @classmethod
    def _schedule_has_no_gaps(cls, schedule: list | None, info: ValidationInfo) -> list | None:
        expected, n = 1, info.data.get("n", 16)
        for entry in schedule or []:
            if len(entry) != 3 or entry[0] is None or entry[2] is None:
                raise ValueError(f"{entry} is no [first, last, stride]")
            first, last, stride = entry
            if expected is None or first != expected or (last is not None and last < first):
                raise ValueError(f"{entry} must begin at {expected or 'nothing: an entry without end comes last'}")
            if not 1 <= stride <= n:
                raise ValueError(f"stride {stride} in {entry} must be between 1 and n={n}")
            expected = None if last is None else last + 1
        if schedule is not None and expected is not None:
            raise ValueError("the last entry must have null for its end")
        return schedule

    @field_validator("coverage")
    @classmethod
    def _coverage_is_below_the_last(cls, coverage: str | list[int], info: ValidationInfo) -> str | list[int]:
        last = info.data.get("n", 16) - 1
        if isinstance(coverage, list) and (
            sorted(set(coverage)) != sorted(coverage) or not all(0 <= j < last for j in coverage)
        ):
            raise ValueError(f"a list holds different numbers from 0 to n - 2 = {last - 1}; {last} is always there")
        return coverage

    @field_validator("lossy_alpha")
    @classmethod
    def _lossy_is_standard(cls, alpha: float, info: ValidationInfo) -> float:
        if alpha < 1 and info.data.get("verify") == "block":
            raise ValueError('only "verify": "standard" can be relaxed')
        return alpha

    @property
    def groups(self) -> tuple[int, ...]:
        """The extra groups that a row may carry, by the number of drafts accepted."""
        if isinstance(self.coverage, list):
            return tuple(self.coverage)
        return tuple(range(self.n - 1)) if self.extra else ()

    @property
    def extra(self) -> int:
        """How many extra groups a row carries at most; for auto what keeps it within 32 slots."""
        if isinstance(self.coverage, list):
            return len(self.coverage)
        room = max(_AUTO_SLOTS // self.masks - 2, 0) if self.coverage == "auto" else self.masks
        return 0 if self.coverage == "last" else min(room, self.masks)

    @property
    def features(self) -> frozenset[str]:
        """What of `patching.record.FEATURES` an engine with these (complete) settings runs."""
        found = {
            "lora": self.lora is not None,
            "groups": bool(self.groups),
            "auto": self.coverage == "auto",
            "rows": self.cpu_linear == "rows",
        }
        return frozenset(name for name, runs in found.items() if runs)

    def stride(self, requests: int) -> int:
        """The stride of a forward with that many requests."""
        for first, last, stride in self.schedule or []:
            if first <= requests and (last is None or requests <= last):
                return stride
        return self.n

    @property
    def masks(self) -> int:
        """Mask slots of a full row: n - 1."""
        return self.n - 1

    @property
    def slots(self) -> int:
        """Most slots behind the pending token: n - 1 drafts, n - 1 masks, and n - 1 for each extra group."""
        return (2 + self.extra) * (self.n - 1)


def _refusal(error: ValidationError, given: dict[str, Any]) -> str:
    lines = []
    for item in error.errors():
        name = str(item["loc"][0]) if item["loc"] else "speculative_config"
        if item["type"] == "extra_forbidden":
            allowed = sorted(ISDSettings.model_fields)
            near = difflib.get_close_matches(name, allowed, 1)
            fix = _NOT_OURS.get(name) or (f'did you mean "{near[0]}"?' if near else "remove it")
            lines.append(f'"{name}" ({given.get(name)!r}) is no ISD setting; allowed are {", ".join(allowed)}; {fix}')
        else:
            field = ISDSettings.model_fields[name]
            lines.append(f'"{name}": {given.get(name)!r} is not allowed: {item["msg"]}. {field.description}')
    return "speculative_config, method isd: " + "; ".join(lines)


def is_isd(config: dict[str, Any] | None, spec_method: str | None = None) -> bool:
    """Whether the user asked for ISD, in `speculative_config` or by `--spec-method`."""
    return (config or {}).get("method") == METHOD or spec_method == METHOD


def parse(config: dict[str, Any], defaults: dict[str, Any] | None = None) -> ISDSettings:
    """Settings from a `speculative_config` of method isd; `defaults` (a zoo entry's) stand under what the user gave.

    Raises SettingsError, naming the setting, its value, what is allowed and the fix.
    """
    given = {key.replace("-", "_"): value for key, value in config.items() if key != "method"}
    merged = {**(defaults or {}), **given}
    try:
        return ISDSettings(**merged)
    except ValidationError as error:
        raise SettingsError(_refusal(error, merged)) from None


def runs_isd(vllm_config: Any) -> bool:
    """Whether an engine with this configuration (None: no configuration) runs ISD."""
    extra = getattr(vllm_config, "additional_config", None)
    return isinstance(extra, dict) and KEY in extra


def of(vllm_config: Any) -> ISDSettings | None:
    """The ISD settings of a running engine, or None where it runs without ISD."""
    return ISDSettings(**vllm_config.additional_config[KEY]) if runs_isd(vllm_config) else None


def wants_isd(params: Any) -> bool:
    """Whether a request's SamplingParams let it be decoded by ISD: `extra_args={"isd": False}` opts out.

    Over HTTP that is `"vllm_xargs": {"isd": "off"}`. Raises ValueError for any other value.
    """
    asked = (getattr(params, "extra_args", None) or {}).get(KEY, True)
    for values, meaning in (((True, "on", "true", 1), True), ((False, "off", "false", 0), False)):
        if asked in values:
            return meaning
    raise ValueError(f'the request\'s extra argument "isd" is {asked!r}: allowed are true or "on", and false or "off"')


def adapter_record(lora: str) -> dict[str, Any]:
    """What `isd.json` beside an adapter says (stride, mask token id, how it was trained); {} without that file."""
    path = Path(lora) / "isd.json"
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise SettingsError(
            f"{path} is not JSON ({error}); restore it from the adapter's source or remove it"
        ) from None


def complete(settings: ISDSettings, hf_config: Any, vocab_size: int) -> ISDSettings:
    """`settings` with the mask token id from the adapter or the checkpoint, checked against the vocabulary.

    Raises SettingsError when no mask token id is known or it lies outside the vocabulary.
    """
    found, source = settings.mask_token_id, "mask_token_id"
    if found is None and settings.lora:
        found, source = adapter_record(settings.lora).get("mask_token_id"), f"{settings.lora}/isd.json"
    if found is None:
        found, source = getattr(hf_config, "mask_token_id", None), "the checkpoint's config.json"
    if found is None:
        raise SettingsError(
            'speculative_config, method isd: "mask_token_id" is not known: neither the settings, nor the adapter\'s '
            "isd.json, nor the checkpoint's config.json name it. Give the id of the token it was trained to fill "
            'in, for example {"method": "isd", "mask_token_id": 151669} for the Qwen3-based I-DLM checkpoints'
        )
    if not 0 <= int(found) < vocab_size:
        raise SettingsError(
            f'speculative_config, method isd: "mask_token_id" {found} (from {source}) is outside the vocabulary: '
            f"allowed are 0..{vocab_size - 1}. Is this the model that the mask token belongs to?"
        )
    return settings.model_copy(update={"mask_token_id": int(found)})
