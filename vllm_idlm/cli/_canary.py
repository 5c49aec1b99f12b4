"""One engine of `idlm doctor --engine`, in a process of its own, by the protocol of `_run`.

    python -m vllm_idlm.cli._canary FD SPEC      # SPEC: JSON, see `Asked`

The engine that decodes plainly answers once. The one with ISD answers the same prompts three times: with the drafts of
its masks, with plain decoding's own tokens as drafts, and with drafts that plain decoding does not emit there.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vllm_idlm.cli._run import Engine, main, margin

AS_THEY_ARE, RIGHT, WRONG = "as they are", "forced right", "forced wrong"
_CPU_KV_BYTES = 600_000_000  # vLLM's CPU build would take 90% of the machine's memory
_BEHIND = 16  # tokens of a long prompt's answer in front of the next block of the cache
_LONG = 200  # tokens of a prompt that counts as long
_KEPT = 40  # tokens at the head of a long prompt that stay


@dataclass
class Asked:
    """What one engine is to do."""

    engine: dict[str, Any]  # keyword arguments of vllm.LLM; `complete` fills what they leave open
    batches: list[list[Any]]  # prompts by batch: texts, or token ids; a prompt's number counts through all batches
    tokens: int  # of each answer
    speculation: dict[str, Any]  # speculative_config; plain decoding only checks it, before anything is loaded
    reference: list[list[int]] | None = None  # plain decoding's answers; None: this is plain decoding
    embedded: bool = False  # the embedded model, float32 on a CPU
    compiled: bool | None = None  # None: as it is served on a GPU, eagerly on a CPU


@dataclass
class Case:
    """One way to answer all prompts."""

    name: str
    answers: list[list[int]]  # token ids
    seconds: float
    stats: dict[str, Any] | None = None  # `isd_stats`, without the trace
    forwards: list[list[list[int]]] = field(default_factory=list)  # by prompt: drafts, accepted, emitted; if forced
    margins: list[list[float] | None] = field(default_factory=list)  # log-probabilities where an answer parts
    pieces: list[list[str]] = field(default_factory=list)  # the text of each token by itself


@dataclass
class Found:
    """What it did and where."""

    prompts: list[list[list[int]]]  # token ids by batch
    cases: list[Case]
    machine: dict[str, Any]  # vllm, runner, device, dtype, mode; settings of ISD


def complete(asked: Asked) -> dict[str, Any]:
    """The keyword arguments of vllm.LLM for this machine: quick to start on a CPU, as it is served on a GPU."""
    from vllm.platforms import current_platform

    cpu = current_platform.is_cpu()
    eager = cpu if asked.compiled is None else not asked.compiled
    made = {"max_model_len": 1024, "max_num_seqs": 4, "disable_log_stats": True, "enforce_eager": eager}
    if cpu:
        made["kv_cache_memory_bytes"] = _CPU_KV_BYTES
        made |= {"dtype": "float32"} if asked.embedded else {}
    return made | asked.engine


def check(options: dict[str, Any], speculation: dict[str, Any]) -> None:
    """Raise what vLLM or ISD has against these options, before any weights are loaded."""
    from vllm.engine.arg_utils import EngineArgs

    EngineArgs(**options, speculative_config=dict(speculation)).create_engine_config()


def ask(llm: Any, batches: list[list[list[int]]], tokens: int) -> list[list[int]]:
    """Greedy answers of that many tokens, batch by batch. Request i is called `canary-i`."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    options = SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )
    core, answers = llm.llm_engine, {}
    for batch in batches:
        first = len(answers)
        for i, ids in enumerate(batch, first):
            core.add_request(f"canary-{i}", {"prompt_token_ids": ids}, options)
        while core.has_unfinished_requests():
            answers |= {o.request_id: list(o.outputs[0].token_ids) for o in core.step() if o.finished}
    return [answers[f"canary-{i}"] for i in range(len(answers))]


def scripts(name: str, prompts: list[list[int]], reference: list[list[int]], mask: int) -> dict[str, list[int]] | None:
    """What `isd_force` takes for the case called `name`: prompts and what to draft behind them."""
    if name == AS_THEY_ARE:
        return None
    drafts = reference if name == RIGHT else [wrong(answer, mask) for answer in reference]
    return {f"canary-{i}": prompt + ids for i, (prompt, ids) in enumerate(zip(prompts, drafts, strict=True))}


def wrong(answer: list[int], mask: int) -> list[int]:
    """For each place another token than the answer's and than the mask: one of the answer, or a small id."""
    pool = [*answer, *answer, 0, 1, 2]
    return [next(t for t in pool[i:] if t not in (right, mask)) for i, right in enumerate(answer)]


def compare(llm: Any, name: str, batches: list[list[list[int]]], reference: list[list[int]], mask: int) -> Case:
    """Have an ISD engine answer as `name` says, and weigh where its answers part from the `reference`."""
    prompts = [ids for batch in batches for ids in batch]
    script = scripts(name, prompts, reference, mask)
    llm.collective_rpc("isd_trace", args=(script is not None,))
    llm.collective_rpc("isd_stats", args=(True,))
    llm.collective_rpc("isd_force", args=(script,))
    began = time.perf_counter()
    answers = ask(llm, batches, len(reference[0]))
    case = Case(name, answers, time.perf_counter() - began)
    llm.collective_rpc("isd_force", args=(None,))
    case.stats = next(s for s in llm.collective_rpc("isd_stats", args=(True,)) if s is not None)
    llm.collective_rpc("isd_trace", args=(False,))
    trace = case.stats.pop("trace") or {}
    named = {request.rpartition("-")[0]: forwards for request, forwards in trace.items()} | trace
    for i in range(len(prompts) if trace else 0):
        own = named.get(f"canary-{i}", [])
        case.forwards.append([[len(f["drafts"]), f["accepted"], len(f["tokens"])] for f in own])
    case.margins = [margin(llm, *three) for three in zip(prompts, reference, answers, strict=True)]
    return case


def machine(config: Any) -> dict[str, Any]:
    """What decodes here, in words, from a VllmConfig."""
    import torch
    import vllm
    from vllm.platforms import current_platform

    from vllm_idlm import settings

    on_gpu, found = torch.cuda.is_available() and not current_platform.is_cpu(), settings.of(config)
    graphs = config.compilation_config.cudagraph_mode
    with_graphs = f", CUDA graphs {graphs.name}" if on_gpu and graphs else ""
    return {
        "vllm": vllm.__version__.split("+")[0],
        "runner": "V2" if config.use_v2_model_runner else "V1",
        "device": torch.cuda.get_device_name(0) if on_gpu else current_platform.device_type.upper(),
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "mode": "eager" if config.model_config.enforce_eager else f"compiled{with_graphs}",
        "settings": None if found is None else found.model_dump(),
    }


def fitted(ids: list[int], block: int) -> list[int]:
    """A long prompt, cut so that its answer begins the next block of the cache in its middle; others as they are."""
    drop = (len(ids) + _BEHIND) % block if len(ids) > _LONG else 0
    return [*ids[:_KEPT], *ids[_KEPT + drop :]]


def execute(asked: Asked, emit: Callable[[dict[str, Any]], None]) -> Found:
    """Start the engine and have it answer."""
    options, plain = complete(asked), asked.reference is None
    if plain:
        emit({"phase": "loading vLLM, checking what is asked for"})
        check(options, asked.speculation)
    emit({"phase": "starting the engine" if options["enforce_eager"] else "starting the engine, compiling"})
    asked.engine = options if plain else {**options, "speculative_config": asked.speculation}
    engine = Engine(asked, emit)
    config = engine.core.vllm_config
    found = Found(asked.batches, [], machine(config))
    if plain:
        found.prompts = [[fitted(engine.ids(p), config.cache_config.block_size) for p in b] for b in asked.batches]
        emit({"phase": "decoding"})
        began = time.perf_counter()
        answers = ask(engine.llm, found.prompts, asked.tokens)
        found.cases.append(Case("plain", answers, time.perf_counter() - began))
    else:
        for name in (AS_THEY_ARE, RIGHT, WRONG):
            emit({"phase": f"decoding, drafts {name}"})
            mask = found.machine["settings"]["mask_token_id"]
            found.cases.append(compare(engine.llm, name, found.prompts, asked.reference, mask))
    for case in found.cases:
        case.pieces = [engine.pieces(answer) for answer in case.answers]
    emit({"phase": "shutting the engine down"})
    engine.core.engine_core.shutdown()
    return found


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], Asked, execute))
