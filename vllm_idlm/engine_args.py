"""From what the user gave vLLM (a zoo name, `{"method": "isd", ...}`, flags) to vLLM's own configuration.

The functions take vLLM's `EngineArgs` and change it before vLLM builds its configuration; the ledger (`ledger.config`)
calls them. ISD enters vLLM as a `custom_class` proposer whose speculative tokens are the slots of a row: drafts, masks.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from vllm_idlm import __version__, cpu_linear, patching
from vllm_idlm.fingerprint import FingerprintError, other_base
from vllm_idlm.proposers.coverage import width
from vllm_idlm.settings import KEY, ISDSettings, SettingsError, adapter_record, complete, is_isd, of, parse, runs_isd

PROPOSER = "vllm_idlm.v1.proposer.ISDProposer"
WORKER_EXTENSION = "vllm_idlm.v1.worker.ISDWorkerExtension"
DRAFT_LORA_ID = 2_147_480_001  # far from the ids that vLLM counts up from 1 for users' adapters
USER_LORAS = "isd_user_loras"  # additional_config: LoRA slots that requests may use; one more is the draft adapter's
VERSION = "isd_version"  # additional_config: of this plugin, for ranks to compare
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's MaxLoRARanks


def prepare(args: Any) -> None:
    """What `args` must hold before vLLM builds any of its configuration: the zoo entry's model, our worker methods."""
    apply_zoo(args)
    if asked(args) and not args.worker_extension_cls:
        args.worker_extension_cls = WORKER_EXTENSION


def apply_zoo(args: Any) -> None:
    """If `args.model` is a name of the model zoo, put the entry's model and its engine settings into `args`.

    A field that the user set to something other than vLLM's default keeps the user's value.
    """
    from vllm_idlm import zoo

    model = getattr(args, "model", None)
    entry = zoo.resolve(model) if isinstance(model, str) else None
    if entry is None:
        return
    defaults = {f.name: _default(f) for f in dataclasses.fields(args)}
    if args.served_model_name is None:
        args.served_model_name = entry.name
    for name, value in entry.engine_defaults().items():
        if name not in defaults:
            raise SettingsError(f"model zoo, {entry.name}: engine setting {name!r} is not one of vLLM's; remove it")
        if getattr(args, name) == defaults[name]:
            setattr(args, name, value)
    args.__dict__["_isd_zoo"] = entry
    args.model = entry.model_path()
    if args.tokenizer == entry.name:
        args.tokenizer = None


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def apply_isd(args: Any, model_config: Any) -> None:
    """Turn a request for ISD in `args` into vLLM's own settings: speculation, LoRA, and our settings for every process.

    Raises SettingsError on a wrong setting, a missing adapter, or a feature of vLLM that ISD does not run with.
    """
    patching.require(())
    entry = args.__dict__.get("_isd_zoo")
    settings = _settings(args, _zoo_defaults(entry))
    _refuse_unsupported(args, model_config)
    if settings.lora:
        settings = settings.model_copy(update={"lora": adapter_folder(settings.lora)})
        if settings.check_base:
            _check_base(settings.lora, model_config.model)
    settings = complete(settings, model_config.hf_config, model_config.get_vocab_size())
    settings = cpu_linear.resolve(settings, model_config.dtype)
    need = (args.max_num_seqs or 0) * (1 + settings.slots)
    if settings.coverage == "auto" and (args.max_num_batched_tokens or need) < need:  # the user's room is for less
        settings = settings.model_copy(update={"coverage": "last"})
    user_loras = args.max_loras if args.enable_lora else 0
    if settings.lora:
        _reserve_lora(args, settings.lora, user_loras)
    args.additional_config = {
        **(args.additional_config or {}),
        KEY: settings.model_dump(),
        USER_LORAS: user_loras,
        VERSION: __version__,
    }
    args.speculative_config = {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": settings.slots}
    args.spec_method = args.spec_tokens = None


def features(config: Any) -> frozenset[str]:
    """What of `patching.record.FEATURES` the engine of a VllmConfig with ISD runs."""
    from vllm.platforms import current_platform

    backend = config.parallel_config.distributed_executor_backend  # vLLM's own choice by then, where none was given
    found = {
        "v2" if config.use_v2_model_runner else "v1": True,
        "cpu": current_platform.is_cpu(),
        "ray": backend == "ray" or bool(getattr(backend, "uses_ray", False)),
        "sdar": getattr(config.model_config.hf_config, "model_type", None) == "sdar",
    }
    return of(config).features | {name for name, runs in found.items() if runs}


def _zoo_defaults(entry: Any) -> dict[str, Any]:
    if entry is None:
        return {}
    found = {"mask_token_id": entry.mask_token_id, "n": entry.n, "lora": entry.lora_path()}
    return {key: value for key, value in found.items() if value is not None}


def _settings(args: Any, defaults: dict[str, Any]) -> ISDSettings:
    config = dict(args.speculative_config or {})
    if args.spec_model is not None:
        raise SettingsError(
            f'--spec-model {args.spec_model!r} does not go with method "isd", which drafts with the served model; '
            'leave it out (a gated adapter is given as "lora" in --speculative-config)'
        )
    if args.spec_tokens is not None:
        if "n" in config:
            raise SettingsError('--spec-tokens and "n" in --speculative-config say the same (n = tokens + 1): give one')
        config["n"] = args.spec_tokens + 1
    lora = config.get("lora", defaults.get("lora"))
    if "n" not in config and isinstance(lora, str):
        stride = adapter_record(lora).get("stride")
        defaults = {"n": stride, **defaults} if stride else defaults
    return parse(config, defaults)


def _refuse_unsupported(args: Any, model_config: Any) -> None:
    if args.pipeline_parallel_size > 1:
        raise SettingsError(
            f"method isd has no pipeline parallelism yet (pipeline_parallel_size={args.pipeline_parallel_size});"
            " set it to 1 and use tensor_parallel_size"
        )
    if model_config.runner_type != "generate":
        raise SettingsError(f"method isd generates text; this model runs as {model_config.runner_type!r}")
    if model_config.is_hybrid or model_config.is_attention_free:
        raise SettingsError(
            "method isd needs attention layers only: a recurrent state cannot be rolled back past a mask slot"
        )


def adapter_folder(lora: str) -> str:
    """The local folder of the adapter `lora` (a folder, or a hub id that is downloaded), checked for what vLLM loads.

    Raises SettingsError when the folder, its adapter_config.json or its safetensors file is missing.
    """
    path = Path(lora).expanduser()
    if not path.is_dir():
        path = _download(lora)
    config = path / "adapter_config.json"
    if not config.is_file():
        raise SettingsError(f'"lora": {lora!r}: {config} is missing; give a folder that holds a peft LoRA adapter')
    if not list(path.glob("*.safetensors")):
        raise SettingsError(
            f'"lora": {lora!r}: no .safetensors file in {path}; adapters are loaded from safetensors only'
        )
    return str(path.resolve())


def _check_base(lora: str, model: str) -> None:
    """SettingsError if the adapter's isd.json names another base model than `model`, where that is on this disk."""
    folder = _checkpoint(model)
    try:
        differ = folder and other_base(adapter_record(lora), folder)
    except FingerprintError:  # no safetensors: other formats are not compared
        return
    if differ:
        raise SettingsError(
            f'"lora": {lora} was trained for {differ[0]}, and the served model {model} is another {differ[1]}. Serve '
            'that base, or an adapter made for this one; "check_base": false lets it pass (the text stays right, '
            "drafts may be poor)"
        )


def _checkpoint(model: str) -> Path | None:
    """The folder of a checkpoint that is on this disk already: a folder, or in the hub's cache."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except Exception:  # nothing cached yet, or no hub id
        return None


def _download(lora: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(lora, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:
        raise SettingsError(
            f'"lora": {lora!r} is neither a folder here nor a model of the hub that can be fetched '
            f"({type(error).__name__}); give the adapter's folder, or check the id and the network"
        ) from None


def _reserve_lora(args: Any, folder: str, user_loras: int) -> None:
    """Turn vLLM's LoRA on with one slot for the draft adapter besides the users', and a rank that holds it."""
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    rank = max([config.get("r", 0), *config.get("rank_pattern", {}).values()])
    if config.get("peft_type") != "LORA" or not 1 <= rank <= _RANKS[-1]:
        raise SettingsError(
            f'"lora": {folder}: peft_type {config.get("peft_type")!r} with rank {rank}: allowed is LORA with rank '
            f"1..{_RANKS[-1]}"
        )
    needed = next(r for r in _RANKS if r >= rank)
    modules = config.get("target_modules")
    if user_loras == 0:
        args.max_lora_rank = needed
        if isinstance(modules, list) and args.lora_target_modules is None:
            args.lora_target_modules = _packed(modules)
        args.max_cpu_loras = None
    else:
        args.max_lora_rank = max(args.max_lora_rank, needed)
        args.max_cpu_loras = args.max_cpu_loras and args.max_cpu_loras + 1
    args.enable_lora = True
    args.max_loras = user_loras + 1


def fit_rows(args: Any, given_budget: int | None) -> None:
    """Make `max_num_batched_tokens` hold a full row of every request; called once vLLM has set its defaults.

    given_budget: what the user gave, None for vLLM's default, which is raised. Raises SettingsError where the user's
    is too small and LoRA is on (vLLM refuses that too, in other words).
    """
    if not runs_isd(args):
        return
    settings = of(args)
    row = 1 + settings.slots
    need = args.max_num_seqs * row
    if given_budget is None:
        args.max_num_batched_tokens = max(args.max_num_batched_tokens, need)
    elif args.enable_lora and given_budget < need:
        raise SettingsError(
            f"max_num_batched_tokens={given_budget} is too small for {args.max_num_seqs} requests (max_num_seqs) of "
            f"{row} rows each (isd, n={settings.n}, LoRA): allowed is at least {need}. Raise it, or lower "
            "max_num_seqs or n"
        )


def fit_v2(config: Any) -> None:
    """What a VllmConfig with ISD on Model Runner V2 needs before vLLM checks it: the schedule in vLLM's own terms.

    Raises SettingsError for features of vLLM whose code does not go through ISD's rejection sampler there.
    """
    found = {
        "parallel_config.enable_batch_sharded_sampling": config.parallel_config.enable_batch_sharded_sampling,
        "watermark_config": config.watermark_config,
        "model_config.return_sampling_mask": config.model_config.return_sampling_mask,
        "model_config.enable_trace_replay": config.model_config.enable_trace_replay,
        "lora_config.specialize_active_lora": config.lora_config and config.lora_config.specialize_active_lora,
    }
    for name, value in found.items():
        if value:
            raise SettingsError(
                f"method isd on Model Runner V2 does not run with {name}={value!r} yet: leave it out, or set "
                "VLLM_USE_V2_MODEL_RUNNER=0 where Model Runner V1 takes it"
            )
    settings = _fit_coverage(config, of(config))
    if settings.verify != "standard" or settings.lossy_alpha < 1:
        raise SettingsError(
            f'"verify": {settings.verify!r}, "lossy_alpha": {settings.lossy_alpha}: Model Runner V2 verifies by the '
            'standard rule alone ("standard", 1.0). Leave them out, or set VLLM_USE_V2_MODEL_RUNNER=0'
        )
    if settings.schedule:
        config.speculative_config.num_speculative_tokens_per_batch_size = [
            (first, last or max(first, config.scheduler_config.max_num_seqs), _slots(settings, stride))
            for first, last, stride in settings.schedule
        ]


def refuse_float32_adapter(config: Any) -> None:
    """SettingsError for an adapter beside a float32 model where vLLM's Triton kernels of LoRA run, which assert half
    precision (in the middle of the engine's start)."""
    from vllm.platforms import current_platform

    dtype = str(config.model_config.dtype).removeprefix("torch.")
    lora = of(config).lora
    if lora and current_platform.is_cuda_alike() and dtype == "float32":
        raise SettingsError(
            f'"lora": {lora!r} does not run with dtype={dtype!r} on {current_platform.device_name}: vLLM\'s '
            "LoRA there is in half precision only, allowed are dtype bfloat16 and float16. Set one of these, or leave "
            "the adapter out"
        )


def _slots(settings: ISDSettings, stride: int) -> int:
    """Slots of a row at that stride: extra groups stand behind full rows only."""
    return settings.slots if stride == settings.n else width(stride)


def _fit_coverage(config: Any, settings: ISDSettings) -> ISDSettings:
    """`settings` with a coverage that this engine has: `auto` is `last` where rows cannot change their width.

    The ranks of data parallelism must agree on it (vLLM turns widths by batch size off there), as must those of an
    external launcher, where each has a scheduler of its own.
    """
    parallel = config.parallel_config
    apart = parallel.data_parallel_size > 1 or parallel.distributed_executor_backend == "external_launcher"
    if settings.coverage == "auto" and (apart or not by_token_ids(config)):
        settings = settings.model_copy(update={"coverage": "last"})
        config.additional_config[KEY] = settings.model_dump()
        config.speculative_config.num_speculative_tokens = settings.slots
    return settings


def by_token_ids(config: Any) -> bool:
    """Whether the model is run by token ids at places in one dimension, as `calibrate` runs it."""
    model = config.model_config
    return not (model.is_multimodal_model or model.enable_prompt_embeds or model.uses_mrope)


def _packed(modules: list[str]) -> list[str]:
    """The adapter's target modules under the names vLLM gives them (it packs q, k, v and gate, up).

    Wrapping these alone keeps vLLM from putting LoRA around the embedding and the output head, which costs time.
    """
    names = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
    names |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
    last = [m.rsplit(".", 1)[-1] for m in modules]
    return sorted({*last, *(names.get(m, m) for m in last)})


def asked(args: Any) -> bool:
    """Whether `args` asks for ISD (and was not already turned into vLLM's settings)."""
    return is_isd(getattr(args, "speculative_config", None), getattr(args, "spec_method", None))
