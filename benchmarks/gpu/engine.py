"""One engine: starts it, lets it work, writes down what it did. A job of jobs.py.

    engine.py --name N --model smollm2|qwen3-8b --method plain|isd|risd|isd:all|.. [--eager | --compile] ..

Without --eager or --compile: full CUDA graphs of decode steps over the eager model (no torch.compile, whose first start
takes minutes); vLLM's own operators for norms and activations are then used, so a forward costs a few percent more.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jobs

# isort: split
SHORT = 16  # tokens of the run that is subtracted: prompts and the ramp
TOP = 8  # log-probabilities kept at each place of plain decoding's answers
_MODULES = (  # imported ahead of the job's turn, behind the plugin: its patches belong to their import
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.qwen3",
    "vllm.v1.attention.backends.flash_attn",
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--name", required=True, help="of the job")
    made.add_argument("--model", default="smollm2", help="smollm2, or a shape of benchmarks.common with dummy weights")
    made.add_argument("--method", default="plain", help="plain, isd, risd; isd:all is isd with that coverage")
    made.add_argument("--n", type=int, default=4)
    made.add_argument("--eager", action="store_true")
    made.add_argument("--compile", action="store_true")
    made.add_argument("--batches", default="1,8,32")
    made.add_argument("--tokens", type=int, default=96, help="decode tokens of a timed run, and of an answer")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--synthetic", type=float, help="accept drafts at this rate")
    made.add_argument("--layers", type=int, help="of a shape; default: all it has")
    made.add_argument("--texts", type=int, default=0, help="greedy answers to so many prompts, kept in the result")
    made.add_argument("--floor", type=int, help="the same answers at this batch, too: plain decoding against itself")
    made.add_argument("--backend", help="attention backend, such as TRITON_ATTN")
    made.add_argument("--rank", type=int, default=128, help="of the dummy adapter of a shape")
    made.add_argument("--kv-gb", type=float, default=4.0)
    made.add_argument("--temperature", type=float, default=0.0, help="of the timed runs")
    made.add_argument("--warm", action="store_true", help="vLLM's own JIT warm-up (slow; off otherwise)")
    return made


def imports() -> None:
    """Import all that an engine needs, before it is this job's turn."""
    from vllm import LLM, SamplingParams  # noqa: F401

    from benchmarks import common, overhead  # noqa: F401
    from vllm_idlm import plugin

    plugin.register()
    for name in _MODULES:
        importlib.import_module(name)


def graph_sizes(method: str, n: int, batches: list[int]) -> list[int]:
    """Rows of the forwards that CUDA graphs are captured for: of every width that this method's rows may have."""
    full, wide = 2 * n - 1, n * n
    widths = {"plain": {1}, "all": {1, wide}, "auto": {1, 3, full, wide}}.get(method.split(":")[-1], {1, full})
    return sorted({batch * rows for batch in batches for rows in widths})


def options(args: argparse.Namespace) -> dict[str, Any]:
    """What vLLM's LLM is given."""
    batches = [int(b) for b in args.batches.split(",")]
    sizes = graph_sizes(args.method, args.n, batches)
    made: dict[str, Any] = {
        "dtype": "bfloat16", "seed": 0, "max_model_len": 1024, "max_num_seqs": max(batches),
        "max_num_batched_tokens": max(2048, sizes[-1]), "kv_cache_memory_bytes": int(args.kv_gb * 1e9),
    }  # fmt: skip
    if not args.warm:
        made["kernel_config"] = {"enable_jit_warmup": False}
    note = jobs.TMP / "gpukit-backend"  # written by smoke.py where FlashAttention 3 fails
    backend = args.backend or (note.read_text().strip() if note.exists() else None)
    if backend:
        made["attention_config"] = {"backend": backend}
    if args.eager:
        made["enforce_eager"] = True
    else:
        graphs = {} if args.compile else {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
        made["compilation_config"] = {**graphs, "cudagraph_capture_sizes": sizes}
    return made


def start(args: argparse.Namespace) -> Any:
    """The engine."""
    from benchmarks import common

    if args.model == "smollm2":
        return common.start(args.method, args.n, **options(args))
    if args.layers:
        common.SHAPES[args.model] = {**common.SHAPES[args.model], "num_hidden_layers": args.layers}
    folder = Path(tempfile.mkdtemp())
    return common.start_shape(args.method, args.n, args.model, folder, rank=args.rank, **options(args))


def configuration(llm: Any) -> dict[str, Any]:
    """What vLLM made of the options."""
    import torch

    config = llm.llm_engine.vllm_config
    compilation = config.compilation_config
    layer = next(iter(compilation.static_forward_context.values()), None)
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "v2": bool(config.use_v2_model_runner),
        "async": bool(config.scheduler_config.async_scheduling),
        "mode": str(compilation.mode),
        "graphs": str(compilation.cudagraph_mode),
        "sizes": list(compilation.cudagraph_capture_sizes or []),
        "invariant": os.environ.get("VLLM_BATCH_INVARIANT") == "1",
        "attention": type(getattr(layer, "impl", None)).__name__,
        "torch": torch.__version__,
    }


class Work:
    """What is asked of one engine."""

    def __init__(self, llm: Any, args: argparse.Namespace) -> None:
        self.llm, self.args = llm, args
        self.isd = args.method != "plain"

    def stats(self) -> dict[str, Any] | None:
        """ISD's counters since the last call; None for plain decoding."""
        return self.llm.collective_rpc("isd_stats", args=(True,))[0] if self.isd else None

    def answers(self, batch: int) -> tuple[list[list[int]], list[list[dict[int, float]]]]:
        """Greedy answers, `batch` at a time; of plain decoding the likeliest tokens at each place, too."""
        from vllm import SamplingParams

        from benchmarks import common

        scored = {} if self.isd else {"logprobs": TOP}
        params = SamplingParams(temperature=0, max_tokens=self.args.tokens, ignore_eos=True, **scored)
        texts, tokens, scores = common.prompts(self.args.texts), [], []
        for first in range(0, len(texts), batch):
            for output in self.llm.chat(common.chats(texts[first : first + batch]), params, use_tqdm=False):
                own = output.outputs[0]
                tokens.append(list(own.token_ids))
                scores.append([{t: round(x.logprob, 4) for t, x in place.items()} for place in own.logprobs or []])
        return tokens, scores

    def texts(self, batch: int) -> dict[str, Any]:
        """The answers as the record has them, with the counters."""
        self.stats()
        began = time.perf_counter()
        tokens, scores = self.answers(batch)
        found = self.stats()
        made: dict[str, Any] = {"answers": tokens, "texts_s": round(time.perf_counter() - began, 2)}
        made["sample"] = self.llm.get_tokenizer().decode(tokens[0])[:300]
        made["stats"] = {k: v for k, v in (found or {}).items() if k != "trace"}
        if not self.isd:
            made["scores"] = scores
        if self.args.floor:
            made["floor"] = {"batch": self.args.floor, "answers": self.answers(self.args.floor)[0]}
        print(made["sample"], "TPF", (found or {}).get("tpf"), flush=True)
        return made

    def _prompts(self, batch: int) -> list[dict[str, Any]]:
        from benchmarks import common

        if self.llm.model_config.skip_tokenizer_init:
            return [{"prompt_token_ids": [(7 * i + j) % 2000 for j in range(64)]} for i in range(batch)]
        return [{"prompt_token_ids": list(x)} for x in common.token_ids(self.llm, (common.prompts(60) * 2)[:batch])]

    def timed(self, batch: int, tokens: int) -> tuple[float, int]:
        """Seconds that `batch` answers of `tokens` tokens take, and the tokens that came."""
        import torch
        from vllm import SamplingParams

        wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        params = SamplingParams(
            temperature=self.args.temperature, max_tokens=tokens, ignore_eos=True, detokenize=False
        )  # fmt: skip
        prompts = self._prompts(batch)
        wait()
        began = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        wait()
        return time.perf_counter() - began, sum(len(o.outputs[0].token_ids) for o in outputs)

    def round(self, batch: int) -> dict[str, Any]:
        """The time of a forward, from a long run less a short one.

        It is time over the forwards of the engine: requests end at different steps, and time over tokens, which goes by
        the slowest of the batch, would be too long.
        """
        self.stats()
        short, _ = self.timed(batch, SHORT)
        before = self.stats()
        long, emitted = self.timed(batch, SHORT + self.args.tokens)
        found = self.stats()
        steps = found["steps"] - before["steps"] if found and before else self.args.tokens
        tpf = found["tpf"] if found else 1.0
        forward = (long - short) / max(steps, 1) * 1e3
        return {
            "ms_per_token": forward / tpf, "ms_per_forward": forward, "tpf": tpf,
            "tokens_per_s": batch * tpf / forward * 1e3, "whole_s": long, "emitted": emitted,
            "host_ms": 1e3 * found["seconds"] / found["steps"] if found and found["steps"] else None,
        }  # fmt: skip

    def row(self, batch: int) -> dict[str, Any]:
        """One batch size: medians over rounds; beside them single steps, which an asynchronous engine blurs."""
        from benchmarks import overhead

        for _ in range(2):  # JIT, allocator
            self.timed(batch, SHORT)
        rounds = [self.round(batch) for _ in range(self.args.rounds)]
        steps = overhead.steps(self.llm, batch, 48)
        row = {"batch": batch, "step_ms_median": statistics.median(steps), "step_ms_mean": statistics.fmean(steps)}
        for key in ("ms_per_token", "ms_per_forward", "tpf", "tokens_per_s", "host_ms"):
            values = [r[key] for r in rounds if r[key] is not None]
            row[key] = round(statistics.median(values), 4) if values else None
        print(json.dumps(row), flush=True)
        return {**row, "rounds": rounds}


def work(llm: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Answers, then times by batch."""
    batches, task = [int(b) for b in args.batches.split(",")], Work(llm, args)
    found = task.texts(max(batches)) if args.texts else {}
    if args.synthetic is not None and task.isd:
        llm.collective_rpc("isd_synthetic", args=(args.synthetic,))
    return {**found, "rows": [task.row(batch) for batch in batches]}


def main() -> None:
    """Start the engine, and write down what it did."""
    args = parser().parse_args()
    imports()
    jobs.gate()
    began = time.time()
    llm = start(args)
    record = {"job": args.name, "args": vars(args), "start_s": round(time.time() - began, 1), **configuration(llm)}
    print(json.dumps(record), flush=True)
    record |= work(llm, args)
    import torch

    record["memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2) if torch.cuda.is_available() else None
    record["seconds"] = round(time.time() - began, 1)
    jobs.result(record)


if __name__ == "__main__":
    main()
    jobs.leave()
