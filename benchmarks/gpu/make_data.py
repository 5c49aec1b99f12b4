"""Self-distilled samples on the GPU, as `idlm data` makes them, but faster: of the answers no text is made.

    make_data.py OUT_DIR [--count 20000] [--seconds 150] [--batch 768]

Writes train-00000.jsonl and eval-00000.jsonl of token ids, which `idlm train` reads.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import jobs

# isort: split


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("out", type=Path)
    made.add_argument("--count", type=int, default=20_000, help="prompts")
    made.add_argument("--seconds", type=float, default=150, help="of generation")
    made.add_argument("--batch", type=int, default=768)
    made.add_argument("--max-tokens", type=int, default=256)
    made.add_argument("--held-out", type=float, default=0.01)
    made.add_argument("--temperatures", default="0,0.7,1.0")
    made.add_argument("--eager", action="store_true")
    return made


def questions(args: argparse.Namespace, folder: Path) -> list[tuple[Any, list[int]]]:
    """The built-in prompts with their token ids, held-out ones first."""
    from vllm_idlm.data import model as models
    from vllm_idlm.data import prompts as sources
    from vllm_idlm.data.keys import side
    from vllm_idlm.data.samples import prompt_ids

    tokenizer = models.tokenizer(folder)
    chosen = sorted(sources.built_in("chat", args.count, 0), key=lambda q: side(q.key, args.held_out) != "eval")
    return [(q, prompt_ids(tokenizer, q.messages, "prompt")) for q in chosen]


def start(args: argparse.Namespace, folder: Path) -> Any:
    """The engine, in a process of its own."""
    from vllm import LLM

    sizes = sorted({1, 64, 256, 512, args.batch})
    graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes}
    own = {"enforce_eager": True} if args.eager else {"compilation_config": graphs}
    return LLM(
        str(folder), dtype="bfloat16", max_num_seqs=args.batch, max_model_len=512, max_num_batched_tokens=16384,
        seed=0, gpu_memory_utilization=0.6, kernel_config={"enable_jit_warmup": False}, disable_log_stats=True, **own,
    )  # fmt: skip


class Writer:
    """Samples as `idlm data` writes them, but for the text."""

    def __init__(self, folder: Path, held_out: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._held_out, self.samples, self.tokens = held_out, 0, 0
        self._files = {name: (folder / f"{name}-00000.jsonl").open("w") for name in ("train", "eval")}

    def add(self, question: Any, ids: list[int], temperature: float, answer: Any) -> None:
        """One finished answer (vLLM's CompletionOutput)."""
        from vllm_idlm.data.keys import side

        row = {
            "prompt_key": question.key, "prompt_index": question.index, "kind": question.kind,
            "temperature": temperature, "finish_reason": answer.finish_reason, "prompt_ids": ids,
            "answer_ids": list(answer.token_ids),
        }  # fmt: skip
        self._files[side(question.key, self._held_out)].write(json.dumps(row) + "\n")
        self.samples, self.tokens = self.samples + 1, self.tokens + len(row["answer_ids"])

    def close(self) -> None:
        """Both files are whole."""
        for file in self._files.values():
            file.close()


def generate(engine: Any, todo: list[tuple[Any, list[int]]], args: argparse.Namespace, writer: Writer) -> int:
    """Answer prompts until the time is up; returns how many are unfinished then."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    began, temperatures = time.time(), [float(t) for t in args.temperatures.split(",")]
    waiting, place = iter(todo), {}
    while time.time() - began < args.seconds:
        while len(place) < 2 * args.batch:  # a queue as long as the batch, so that no slot is empty
            found = next(waiting, None) if time.time() - began < args.seconds - 10 else None
            if found is None:
                break
            question, ids = found
            t = temperatures[question.index % len(temperatures)]
            params = SamplingParams(
                temperature=t, max_tokens=args.max_tokens, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
            )
            engine.add_request(str(question.index), {"prompt_token_ids": ids}, params)
            place[str(question.index)] = (question, ids, t)
        if not place:
            break
        for output in engine.step():
            if output.finished:
                key = output.request_id if output.request_id in place else output.request_id.split("-")[0]
                writer.add(*place.pop(key), output.outputs[0])
    return len(place)


def main() -> None:
    """Make the samples, and write down how fast."""
    args = parser().parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    import vllm  # noqa: F401

    from vllm_idlm import embedded

    folder = embedded.ensure()
    todo = questions(args, folder)
    jobs.gate()
    began = time.time()
    llm = start(args, folder)
    started, began = time.time() - began, time.time()
    writer = Writer(args.out, args.held_out)
    unfinished = generate(llm.llm_engine, todo, args, writer)
    writer.close()
    took = time.time() - began
    found = {"job": "train-data", "samples": writer.samples, "tokens": writer.tokens, "unfinished": unfinished}
    found |= {"seconds": round(took, 1), "start_s": round(started, 1), "tokens_per_s": round(writer.tokens / took)}
    print(json.dumps(found), flush=True)
    jobs.result(found)
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
    jobs.leave()
