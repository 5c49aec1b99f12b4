"""Ray Serve applications of zoo models with ISD: what a Serve config names in `import_path` (see `configs/ray/`).

Ray's own LLM application does the serving (`ray.serve.llm`); this fills in what the zoo knows.
"""

from __future__ import annotations

from typing import Any

from vllm_idlm import zoo


def build(args: dict[str, Any]) -> Any:
    """Ray Serve's OpenAI-compatible application. args: as for `ray.serve.llm:build_openai_app`, with zoo names.

    Each of `llm_configs` may leave out what the zoo says of its `model_loading_config.model_id`: the weights, the
    engine's settings, and ISD with mask token and adapter. What it does say wins. Raises ZooError.
    """
    from ray.serve.llm import build_openai_app

    return build_openai_app({**args, "llm_configs": [llm_config(given) for given in args["llm_configs"]]})


def llm_config(given: dict[str, Any]) -> dict[str, Any]:
    """One of `llm_configs`, complete. A model that is no zoo name, or that brings its weights, stays as it is."""
    loading = given["model_loading_config"]
    if "model_source" in loading:
        return given
    entry = zoo.load(loading["model_id"])
    isd = {"method": "isd", "n": entry.n, "mask_token_id": entry.mask_token_id, "lora": entry.lora_path()}
    engine = {"speculative_config": {key: value for key, value in isd.items() if value is not None}}
    engine |= {**entry.engine_defaults(), **given.get("engine_kwargs", {})}
    return {**given, "model_loading_config": {**loading, "model_source": entry.model_path()}, "engine_kwargs": engine}
