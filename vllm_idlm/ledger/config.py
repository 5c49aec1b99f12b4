"""Ledger: how `{"method": "isd"}` and the names of the model zoo enter vLLM's configuration; requests' own."""

from __future__ import annotations

import threading

from vllm_idlm.patching import misfit, of_isd, patch, require, runs_isd

_ARGS = "vllm.engine.arg_utils"

zoo_names = patch(
    "zoo-names",
    _ARGS,
    what="EngineArgs.create_engine_config first resolves a model-zoo name into the model and its engine settings",
    why="a zoo name must work wherever vLLM takes a model; vLLM has no hook before it reads the model's config",
    removed_by="a registry of model aliases, or a general-plugin hook on EngineArgs",
)


@zoo_names.wraps("EngineArgs.create_engine_config")
def create_engine_config(original, self, *args, **kwargs):
    """Put the zoo entry's model and settings, and our worker methods, into the arguments first."""
    from vllm_idlm.engine_args import prepare

    prepare(self)
    return original(self, *args, **kwargs)


@zoo_names.wraps("get_model_path")
def get_model_path(original, model, *args, **kwargs):
    """Let a zoo name pass the offline look-up of `EngineArgs.__post_init__`."""
    from vllm_idlm import zoo

    return model if zoo.resolve(str(model)) else original(model, *args, **kwargs)


method_isd = patch(
    "method-isd",
    _ARGS,
    what="EngineArgs.create_speculative_config turns method isd into a custom_class proposer and our settings",
    why="vLLM's list of speculative methods is closed (a Literal)",
    removed_by="a registry of speculative methods for plugins (vllm#36219)",
)
method_isd.reads(
    "EngineArgs",
    fields=("spec_method", "spec_model", "spec_tokens", "additional_config", "lora_target_modules", "max_loras"),
)


@method_isd.wraps("EngineArgs.create_speculative_config")
def create_speculative_config(original, self, target_model_config, *args, **kwargs):
    """Apply ISD's settings to the arguments where they ask for it."""
    from vllm_idlm.engine_args import apply_isd, asked

    if asked(self):
        apply_isd(self, target_model_config)
    return original(self, target_model_config, *args, **kwargs)


row_budget = patch(
    "row-budget",
    _ARGS,
    what="the default of max_num_batched_tokens is raised to a full ISD row for each of max_num_seqs requests",
    why="vLLM's default does not know how wide a speculative row is: at larger n it refuses to start with LoRA, and "
    "without LoRA it would cut rows",
    removed_by="defaults in vLLM that count num_speculative_tokens",
)


@row_budget.wraps("EngineArgs._set_default_max_num_seqs_and_batched_tokens_args")
def set_defaults(original, self, *args, **kwargs):
    """Let vLLM set its defaults, then make room for full rows."""
    if not runs_isd(self):
        return original(self, *args, **kwargs)
    from vllm_idlm.engine_args import fit_rows

    given = self.max_num_batched_tokens
    original(self, *args, **kwargs)
    return fit_rows(self, given)


spec_method_flag = patch(
    "spec-method-flag",
    _ARGS,
    what="the CLI's --spec-method takes isd besides vLLM's own methods",
    why="argparse choices are made from vLLM's closed list of methods",
    removed_by="a registry of speculative methods for plugins",
    optional=True,
)


@spec_method_flag.wraps("EngineArgs.add_cli_args")
def add_cli_args(original, parser):
    """Add the choice to vLLM's flag."""
    parser = original(parser)
    for action in getattr(parser, "_actions", ()):
        if "--spec-method" in action.option_strings and action.choices is not None:
            action.choices = [*action.choices, "isd"]
    return parser


min_p_and_logit_bias = patch(
    "min-p-and-logit-bias",
    "vllm.sampling_params",
    what="SamplingParams._validate_spec_decode lets min_p and logit_bias pass when the engine runs ISD",
    why="vLLM refuses them under any speculation as its rejection sampler ignores them; ISD's applies them exactly",
    removed_by="a rejection sampler in vLLM that applies every logits processor (vllm#42744, #42802, #38469)",
    optional=True,
)


@min_p_and_logit_bias.wraps("SamplingParams._validate_spec_decode")
def _validate_spec_decode(original, self, speculative_config):
    """Check nothing where the proposer is ISD's."""
    from vllm_idlm.engine_args import PROPOSER

    if getattr(speculative_config, "model", None) == PROPOSER:
        return None
    return original(self, speculative_config)


request_options = patch(
    "request-options",
    "vllm.v1.engine.input_processor",
    what="InputProcessor refuses odd ISD options of a request, and structured output where grammar-keeps-slots does "
    "not fit",
    why="a bad request must be refused before it reaches the engine, as a bad request",
    removed_by="a plugin's own validation of requests",
)
request_options.reads("vllm.exceptions:VLLMValidationError", "parameter")


@request_options.wraps("InputProcessor._validate_params")
def _validate_params(original, self, params, *args, **kwargs):
    """Refuse the request as vLLM refuses one; over HTTP any other class of error would be an internal error."""
    if of_isd(self):
        from vllm.exceptions import VLLMValidationError

        from vllm_idlm.settings import wants_isd

        try:
            wants_isd(params)
        except ValueError as error:
            raise VLLMValidationError(str(error), parameter="isd") from None
        if getattr(params, "structured_outputs", None) is not None and (problem := misfit("grammar")):
            raise VLLMValidationError(problem, parameter="structured_outputs")
    return original(self, params, *args, **kwargs)


user_lora_needs_enable_lora = patch(
    "user-lora-needs-enable-lora",
    "vllm.v1.engine.input_processor",
    "lora",
    what="InputProcessor refuses a request's adapter when LoRA is on for the draft adapter alone",
    why="with R-ISD vLLM's LoRA is on although the user did not enable it, and no slot is left for a request's adapter",
    removed_by="adapters of vLLM's own that are not requests' (a reserved LoRA slot)",
)


@user_lora_needs_enable_lora.wraps("InputProcessor._validate_lora")
def _validate_lora(original, self, lora_request):
    """Refuse a request's adapter where the engine has no slot for one."""
    if not of_isd(self) or lora_request is None:
        return original(self, lora_request)
    from vllm_idlm.engine_args import USER_LORAS

    if self.vllm_config.additional_config.get(USER_LORAS, 1) == 0:
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError(
            f"Got lora_request {lora_request.lora_name!r} but LoRA is not enabled for requests: the engine runs "
            "the gated draft adapter only. Start it with --enable-lora (and --max-loras) to serve adapters."
        )
    return original(self, lora_request)


v2_config = patch(
    "v2-config",
    "vllm.config.vllm",
    "v2",
    what="VllmConfig takes ISD's custom_class for what Model Runner V2 and asynchronous scheduling support",
    why="both are refused to custom_class proposers because V2 cannot build them; ISD brings its own V2 speculator",
    removed_by="custom_class (or a registry of speculators) in Model Runner V2 (vllm#36219); since 0.33 the check of "
    "asynchronous scheduling asks for the method on V1 only, so that the wrapped get_args is 0.32's",
)
v2_config.reads("EagleModelTypes")
v2_config.reads("VllmConfig", fields=("scheduler_config",))
_CHECKED = threading.local()  # .on_v2: whether the VllmConfig that this thread checks is ISD's on V2


@v2_config.wraps("VllmConfig._get_v2_model_runner_unsupported_features", holds=('"custom_class"',))
def _get_v2_model_runner_unsupported_features(original, self):
    """Leave custom_class out of the list for ISD."""
    names = original(self)
    return [name for name in names if name != "speculative method 'custom_class'"] if runs_isd(self) else names


@v2_config.wraps("VllmConfig.__post_init__", holds=("get_args(EagleModelTypes)", "check_and_update_config(self)"))
def __post_init__(original, self, *args, **kwargs):  # noqa: N807
    """Fit an ISD configuration to Model Runner V2 before vLLM checks it; keep the user's asynchronous scheduling."""
    if not (runs_isd(self) and self.use_v2_model_runner):
        return original(self, *args, **kwargs)
    from vllm_idlm.engine_args import fit_v2

    fit_v2(self)
    asked, _CHECKED.on_v2 = self.scheduler_config.async_scheduling, True
    try:
        original(self, *args, **kwargs)
    finally:
        _CHECKED.on_v2 = False
    if asked:  # the CPU platform turns it off as of no use, which is no reason to refuse it
        self.scheduler_config.async_scheduling = True
    return None


@v2_config.wraps("get_args")
def get_args(original, tp):
    """Name custom_class among the methods that asynchronous scheduling knows, while an ISD configuration is checked.

    The check is inline code of `__post_init__` that asks `get_args(EagleModelTypes)`.
    """
    names = original(tp)
    if getattr(_CHECKED, "on_v2", False):
        from vllm.config import vllm as module

        return (*names, "custom_class") if tp is module.EagleModelTypes else names
    return names


# Entered last, so that it is the outermost of the wrappers of `__post_init__`: it requires the others.
settled_config = patch(
    "settled-config",
    "vllm.config.vllm",
    what="before vLLM checks a VllmConfig with ISD, the patches of all that its engine runs are required, and what "
    "cannot run is refused",
    why="the model runner, Ray and the model's dtype are settled there and not before",
    removed_by="a plugin's own validation of VllmConfig",
)
settled_config.reads("VllmConfig", fields=("use_v2_model_runner", "parallel_config", "model_config"))


@settled_config.wraps("VllmConfig.__post_init__")
def require_features(original, self, *args, **kwargs):
    """Refuse an engine with ISD whose patches do not fit."""
    if runs_isd(self):
        from vllm_idlm import engine_args

        require(engine_args.features(self))
        engine_args.refuse_float32_adapter(self)
    return original(self, *args, **kwargs)
