"""Ledger: how `{"method": "isd"}` and the names of the model zoo enter vLLM's configuration."""

from __future__ import annotations

import functools
from types import ModuleType

from vllm_idlm.ledger.core import expect, expect_source, patch, runs_isd


@patch(
    "zoo-names",
    "vllm.engine.arg_utils",
    what="EngineArgs.create_engine_config first resolves a model-zoo name into the model and its engine settings",
    why="a zoo name must work wherever vLLM takes a model; vLLM has no hook before it reads the model's config",
    removed_by="a registry of model aliases, or a general-plugin hook on EngineArgs",
)
def zoo_names(module: ModuleType) -> None:
    """Wrap `create_engine_config`, and let a zoo name pass the offline look-up of `EngineArgs.__post_init__`."""
    original = expect(module.EngineArgs, "create_engine_config", "self")
    offline = expect(module, "get_model_path", "model")

    @functools.wraps(original)
    def create_engine_config(self, *args, **kwargs):
        from vllm_idlm.engine_args import prepare

        prepare(self)
        return original(self, *args, **kwargs)

    @functools.wraps(offline)
    def get_model_path(model, *args, **kwargs):
        from vllm_idlm import zoo

        return model if zoo.resolve(str(model)) else offline(model, *args, **kwargs)

    module.EngineArgs.create_engine_config = create_engine_config
    module.get_model_path = get_model_path


@patch(
    "method-isd",
    "vllm.engine.arg_utils",
    what="EngineArgs.create_speculative_config turns method isd into a custom_class proposer and our settings",
    why="vLLM's list of speculative methods is closed (a Literal)",
    removed_by="a registry of speculative methods for plugins",
)
def method_isd(module: ModuleType) -> None:
    """Wrap `create_speculative_config`."""
    original = expect(module.EngineArgs, "create_speculative_config", "self", "target_model_config")
    for field in ("spec_method", "spec_model", "spec_tokens", "additional_config", "lora_target_modules", "max_loras"):
        expect_field(module.EngineArgs, field)

    @functools.wraps(original)
    def create_speculative_config(self, target_model_config, *args, **kwargs):
        from vllm_idlm.engine_args import apply_isd, asked

        if asked(self):
            apply_isd(self, target_model_config)
        return original(self, target_model_config, *args, **kwargs)

    module.EngineArgs.create_speculative_config = create_speculative_config


def expect_field(owner: type, name: str) -> None:
    """`owner` must be a dataclass with the field `name`; else LedgerError."""
    from vllm_idlm.ledger.core import refuse

    if name not in getattr(owner, "__dataclass_fields__", {}):
        raise refuse(f"{owner.__name__}.{name}", "no such field")


@patch(
    "row-budget",
    "vllm.engine.arg_utils",
    what="the default of max_num_batched_tokens is raised to a full ISD row for each of max_num_seqs requests",
    why="vLLM's default does not know how wide a speculative row is: at larger n it refuses to start with LoRA, and "
    "without LoRA it would cut rows",
    removed_by="defaults in vLLM that count num_speculative_tokens",
)
def row_budget(module: ModuleType) -> None:
    """Wrap `_set_default_max_num_seqs_and_batched_tokens_args`."""
    original = expect(module.EngineArgs, "_set_default_max_num_seqs_and_batched_tokens_args", "self")

    @functools.wraps(original)
    def set_defaults(self, *args, **kwargs):
        from vllm_idlm.engine_args import fit_rows

        given = self.max_num_batched_tokens
        original(self, *args, **kwargs)
        fit_rows(self, given)

    module.EngineArgs._set_default_max_num_seqs_and_batched_tokens_args = set_defaults


@patch(
    "spec-method-flag",
    "vllm.engine.arg_utils",
    what="the CLI's --spec-method takes isd besides vLLM's own methods",
    why="argparse choices are made from vLLM's closed list of methods",
    removed_by="a registry of speculative methods for plugins",
)
def spec_method_flag(module: ModuleType) -> None:
    """Wrap `EngineArgs.add_cli_args` to add the choice."""
    original = expect(module.EngineArgs, "add_cli_args", "parser")

    @functools.wraps(original)
    def add_cli_args(parser):
        parser = original(parser)
        for action in parser._actions:
            if "--spec-method" in action.option_strings and action.choices is not None:
                action.choices = [*action.choices, "isd"]
        return parser

    module.EngineArgs.add_cli_args = staticmethod(add_cli_args)


@patch(
    "min-p-and-logit-bias",
    "vllm.sampling_params",
    what="SamplingParams._validate_spec_decode lets min_p and logit_bias pass when the engine runs ISD",
    why="vLLM refuses them under any speculation as its rejection sampler ignores them; ISD's applies them exactly",
    removed_by="a rejection sampler in vLLM that applies every logits processor",
)
def min_p_and_logit_bias(module: ModuleType) -> None:
    """Wrap `_validate_spec_decode`."""
    original = expect(module.SamplingParams, "_validate_spec_decode", "self", "speculative_config")

    @functools.wraps(original)
    def _validate_spec_decode(self, speculative_config):
        from vllm_idlm.engine_args import PROPOSER

        if getattr(speculative_config, "model", None) == PROPOSER:
            return None
        return original(self, speculative_config)

    module.SamplingParams._validate_spec_decode = _validate_spec_decode


@patch(
    "user-lora-needs-enable-lora",
    "vllm.v1.engine.input_processor",
    what="InputProcessor refuses a request's adapter when LoRA is on for the draft adapter alone, and odd ISD options",
    why="with R-ISD vLLM's LoRA is on although the user did not enable it, and no slot is left for a request's adapter",
    removed_by="adapters of vLLM's own that are not requests' (a reserved LoRA slot)",
)
def user_lora_needs_enable_lora(module: ModuleType) -> None:
    """Wrap `InputProcessor._validate_lora` and `_validate_params`."""
    from vllm.exceptions import VLLMValidationError

    original = expect(module.InputProcessor, "_validate_lora", "self", "lora_request")
    params = expect(module.InputProcessor, "_validate_params", "self", "params")

    @functools.wraps(original)
    def _validate_lora(self, lora_request):
        from vllm_idlm.engine_args import USER_LORAS

        extra = self.vllm_config.additional_config
        if lora_request is not None and isinstance(extra, dict) and extra.get(USER_LORAS, 1) == 0:
            raise VLLMValidationError(
                f"Got lora_request {lora_request.lora_name!r} but LoRA is not enabled for requests: the engine runs "
                "the gated draft adapter only. Start it with --enable-lora (and --max-loras) to serve adapters."
            )
        return original(self, lora_request)

    @functools.wraps(params)
    def _validate_params(self, params_, *args, **kwargs):
        from vllm_idlm.settings import wants_isd

        if runs_isd(self.vllm_config):
            try:
                wants_isd(params_)
            except ValueError as error:  # over HTTP any other class would be an internal error
                raise VLLMValidationError(str(error), parameter="isd") from None
        return params(self, params_, *args, **kwargs)

    module.InputProcessor._validate_lora = _validate_lora
    module.InputProcessor._validate_params = _validate_params


@patch(
    "v2-config",
    "vllm.config.vllm",
    what="VllmConfig takes ISD's custom_class for what Model Runner V2 and asynchronous scheduling support",
    why="both are refused to custom_class proposers because V2 cannot build them; ISD brings its own V2 speculator",
    removed_by="custom_class (or a registry of speculators) in Model Runner V2",
)
def v2_config(module: ModuleType) -> None:
    """Wrap `_get_v2_model_runner_unsupported_features`, and `get_args` while an ISD configuration is checked.

    The check of asynchronous scheduling is inline code that asks `get_args(EagleModelTypes)` for the methods it knows.
    """
    config = module.VllmConfig
    unsupported = expect_source(config, "_get_v2_model_runner_unsupported_features", '"custom_class"')
    post_init = expect_source(config, "__post_init__", "get_args(EagleModelTypes)", "check_and_update_config(self)")
    get_args, eagle = expect(module, "get_args"), module.EagleModelTypes
    checking: list[bool] = []

    @functools.wraps(unsupported)
    def _get_v2_model_runner_unsupported_features(self):
        found = unsupported(self)
        return [f for f in found if f != "speculative method 'custom_class'"] if runs_isd(self) else found

    @functools.wraps(post_init)
    def __post_init__(self, *args, **kwargs):  # noqa: N807
        checking.append(runs_isd(self) and self.use_v2_model_runner)
        if checking[-1]:
            from vllm_idlm.engine_args import fit_v2

            fit_v2(self)
        asked = self.scheduler_config.async_scheduling
        try:
            post_init(self, *args, **kwargs)
        finally:
            on_v2 = checking.pop()
        if on_v2 and asked:  # the CPU platform turns it off as of no use, which is no reason to refuse it
            self.scheduler_config.async_scheduling = True

    def methods(literal):
        found = get_args(literal)
        return (*found, "custom_class") if literal is eagle and checking and checking[-1] else found

    config._get_v2_model_runner_unsupported_features = _get_v2_model_runner_unsupported_features
    config.__post_init__, module.get_args = __post_init__, methods
