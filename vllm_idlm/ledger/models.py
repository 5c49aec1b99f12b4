"""Ledger: model architectures and configurations that vLLM does not know (`SDARForCausalLM`, model type `sdar`)."""

from __future__ import annotations

from types import ModuleType

from vllm_idlm.patching import LedgerError, patch

MODEL_CLASSES = {"SDARForCausalLM": "vllm_idlm.models.sdar:SDARForCausalLM"}

architectures = patch(
    "architectures",
    "vllm.model_executor.models.registry",
    "sdar",
    what="ModelRegistry knows SDARForCausalLM, by the name of our class",
    why="the published I-DLM checkpoints carry this architecture; vLLM's public register_model is called, only when "
    "vLLM imports its registry, so that the plugin itself stays cheap",
    removed_by="SDARForCausalLM in vLLM",
)
architectures.reads("_ModelRegistry.register_model", "self", "model_arch", "model_cls")
architectures.reads("_ModelRegistry", fields=("models",))
architectures.reads("ModelRegistry")


@architectures.applies
def register(module: ModuleType) -> None:
    """Register each architecture that vLLM does not have itself, as a string: its module is imported when served."""
    for name, model_class in MODEL_CLASSES.items():
        if name not in module.ModelRegistry.models:
            module.ModelRegistry.register_model(name, model_class)


config_sdar = patch(
    "config-sdar",
    "vllm.transformers_utils.config",
    "sdar",
    what="vLLM's table of model types has sdar, with the name of our configuration class",
    why="transformers does not know the type, and the checkpoints' auto_map would run remote code for it",
    removed_by="model type sdar in transformers or vLLM",
)
config_sdar.reads("_CONFIG_REGISTRY")


@config_sdar.applies
def enter_model_type(module: ModuleType) -> None:
    """Enter the name; vLLM registers the class with transformers' AutoConfig itself, in each process that needs it."""
    _enter(module, "_CONFIG_REGISTRY", "sdar", "SDARConfig")


config_sdar_class = patch(
    "config-sdar-class",
    "vllm.transformers_utils.configs",
    "sdar",
    what="vLLM's table of configuration classes has SDARConfig, with the name of our module",
    why="the class's parent takes transformers a second or more to import, and few users serve this model type",
    removed_by="model type sdar in transformers or vLLM",
)
config_sdar_class.reads("_CLASS_TO_MODULE")


@config_sdar_class.applies
def enter_class(module: ModuleType) -> None:
    """Enter the module's name; vLLM imports it when the class is first asked for."""
    _enter(module, "_CLASS_TO_MODULE", "SDARConfig", "vllm_idlm.models.sdar_config")


def _enter(module: ModuleType, table: str, key: str, value: str) -> None:
    """Add `key: value` to the table called `table`, unless vLLM has that key itself."""
    entries = getattr(module, table, None)
    if not isinstance(entries, dict):
        raise LedgerError(f"{module.__name__}.{table}: not a dict")
    entries.setdefault(key, value)
