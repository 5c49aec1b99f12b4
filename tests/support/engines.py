"""Real vLLM engines for tests: started once per set of options, kept for the session, at most a few at a time."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

MASK = 16  # SmolLM2's mask token: an id its tokenizer reserves
_KEEP = 3
_ENGINES: OrderedDict[str, Any] = OrderedDict()
STARTS: list[tuple[str, float]] = []  # options of every engine started in this process, and the seconds it took


def engine(model: str, **options: Any) -> Any:
    """A vllm.LLM in this process: float32, eager, a small KV cache, unless `options` say otherwise."""
    key = repr((model, sorted(options.items(), key=str)))
    if key not in _ENGINES:
        from vllm.platforms import current_platform

        type(current_platform).simple_compile_backend = "eager"  # else ranks of log-probabilities are compiled, in 20 s
        from vllm import LLM

        gc.unfreeze()
        with _no_collections():
            while len(_ENGINES) >= _KEEP:
                _ENGINES.popitem(last=False)
        gc.collect()
        defaults = {
            "dtype": "float32",
            "enforce_eager": True,
            "kv_cache_memory_bytes": 200_000_000,
            "max_model_len": 512,
            "max_num_seqs": 16,
            "disable_log_stats": True,
        }
        began = time.monotonic()
        with _no_collections():
            _ENGINES[key] = LLM(model, **{**defaults, **options})
        STARTS.append((key, time.monotonic() - began))
    _ENGINES.move_to_end(key)
    return _ENGINES[key]


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Leave out the eight collections of garbage of an engine's start and end, most of the time that a small one takes.

    Each looks at every object of torch and vLLM, in 0.3 s and more; one between the two does for both.
    """
    collect, gc.collect = gc.collect, lambda *_: 0
    try:
        yield
    finally:
        gc.collect = collect


def isd(n: int = 4, **settings: Any) -> dict[str, Any]:
    """A speculative_config that asks for ISD; rows do as they are told, not what clocks make fastest."""
    return {"method": "isd", "n": n, "coverage": "last", **settings}


def tokens(outputs: list[Any]) -> list[list[list[int]]]:
    """Token ids of every completion of every request."""
    return [[list(completion.token_ids) for completion in output.outputs] for output in outputs]


def proposer(llm: Any) -> Any:
    """The ISDProposer of an in-process engine."""
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner.isd


def told(cost: Callable[[int, bool], float]) -> Callable[[int, bool], float]:
    """A cost for `auto` (rows, masked -> seconds) that steps do not correct and that passes for known."""

    def fixed(rows: int, masked: bool) -> float:
        return cost(rows, masked)

    fixed.observe, fixed.known = (lambda *_: None), (lambda _: 1.0)
    return fixed


def preemptions(llm: Any) -> list[str]:
    """A list that every preemption of an in-process engine adds its request to from now on."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    preempted, original = [], scheduler._preempt_request

    def preempt(request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return original(request, *args, **kwargs)

    scheduler._preempt_request = preempt
    return preempted


def python_path(folder: Any) -> str:
    """A PYTHONPATH of this folder before what is on it already (`make test-next` has a vLLM there)."""
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def in_a_process(command: list[str], env: dict[str, str]) -> Any:
    """What a script prints as JSON behind the word FOUND; AssertionError with its output's end if it fails."""
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    return json.loads(line.removeprefix("FOUND "))


def stats(llm: Any, reset: bool = True) -> dict[str, Any]:
    """ISD's counts since the last reset."""
    return llm.collective_rpc("isd_stats", args=(reset,))[0]
