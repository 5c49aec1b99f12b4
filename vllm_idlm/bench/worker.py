"""The child's side of `idlm bench`: one engine, in a process of its own, that measures rounds as it is told.

    python -m vllm_idlm.bench.worker FD SPEC    # FD: an open descriptor for events; SPEC: JSON, see `Spec`

Commands come as JSON lines on stdin: {"chats", "concurrency", "temperature", "tokens", "fixed", "warm_up"}. Events:
{"ready": facts} | {"answers": done so far} | {"round": figures} | {"failed": vLLM's own message}.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

from vllm_idlm.bench import counters, load

Emit = Callable[[dict[str, Any]], None]


@dataclass
class Spec:
    """What engine to start."""

    engine: dict[str, Any]  # keyword arguments of vllm.LLM


class Worker:
    """An engine and what it has been asked."""

    def __init__(self, spec: Spec, emit: Emit) -> None:
        from vllm.platforms import current_platform

        if current_platform.is_cpu():  # one process an engine: another would only take a core from it
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM

        began = time.perf_counter()
        self.emit = emit
        self.llm = LLM(**{"disable_log_stats": False, **spec.engine})
        self.tokenizer = self.llm.get_tokenizer()
        self.isd = (spec.engine.get("speculative_config") or {}).get("method") == "isd"
        emit({"ready": {"start_seconds": time.perf_counter() - began, **self.facts()}})

    def facts(self) -> dict[str, Any]:
        """Of the engine: precision, room for keys and values, memory, ISD's settings."""
        config = self.llm.llm_engine.vllm_config
        found = {"dtype": str(config.model_config.dtype).removeprefix("torch.")}
        found["compiled"] = not config.model_config.enforce_eager
        blocks, size = config.cache_config.num_gpu_blocks, config.cache_config.block_size
        found["kv_tokens"] = blocks * size if blocks else None
        if self.isd:
            from vllm_idlm import settings

            found["isd"] = settings.of(config).model_dump()
            found["isd"]["lora"] = os.path.basename(found["isd"]["lora"] or "") or None  # not where it lies here
        return found | memory()

    def prompt(self, chat: list[dict[str, str]]) -> Any:
        """A chat as the engine takes it: by the model's template, or its last text where there is none."""
        if getattr(self.tokenizer, "chat_template", None) is None:
            return chat[-1]["content"]
        ids = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        return {"prompt_token_ids": list(ids)}

    def round(self, asked: dict[str, Any]) -> dict[str, Any]:
        """One round's figures: the answers and their times, what vLLM and ISD counted, memory."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        options = SamplingParams(
            temperature=asked["temperature"], max_tokens=asked["tokens"], ignore_eos=asked["fixed"],
            detokenize=False, output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        done = 0

        def on_answer() -> None:
            nonlocal done
            done += 1
            self.emit({"answers": done})

        prompts = [self.prompt(chat) for chat in asked["chats"]]
        before = counters.read(self.llm)
        if self.isd:
            counters.isd(self.llm)
        made = load.drive(self.llm, prompts, options, asked["concurrency"], on_answer).as_dict()
        counted = counters.since(before, counters.read(self.llm))
        return {**made, "vllm": counted, "isd": counters.isd(self.llm) if self.isd else None, **memory()}

    def close(self) -> None:
        """Shut the engine down."""
        self.llm.llm_engine.engine_core.shutdown()


def memory() -> dict[str, Any]:
    """Bytes: resident in this process and its children, and on the device if there is one."""
    import psutil
    import torch

    own = psutil.Process()
    resident = sum(process.memory_info().rss for process in [own, *own.children(recursive=True)])
    if not torch.cuda.is_available():
        return {"resident_bytes": resident, "device_bytes": None}
    free, whole = torch.cuda.mem_get_info()
    return {"resident_bytes": resident, "device_bytes": whole - free}  # all engines on the device together


def told(error: BaseException) -> str:
    """An error in its own words, its first cause last."""
    words = [f"{type(error).__name__}: {error}"]
    while (error := error.__cause__) is not None:
        words.append(f"because of {type(error).__name__}: {error}")
    return "\n".join(words)


def serve(spec: Spec, commands: TextIO, emit: Emit) -> int:
    """Start the engine and do what is asked until stdin ends; the exit status."""
    try:
        worker = Worker(spec, emit)
        for line in commands:
            emit({"round": worker.round(json.loads(line))})
        worker.close()
    except Exception as error:
        traceback.print_exc()
        emit({"failed": told(error)})
        return 1
    return 0


def main(descriptor: int, spec: str) -> int:
    """Run `spec`, write events to `descriptor`."""
    with os.fdopen(descriptor, "w", buffering=1, encoding="utf-8") as events:
        return serve(Spec(**json.loads(spec)), sys.stdin, lambda event: events.write(json.dumps(event) + "\n"))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2]))
