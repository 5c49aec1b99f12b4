"""The kernels, compiled, against their plain torch forms; FlashAttention 3's and vLLM's operators. A job of jobs.py.

    smoke.py                 on the GPU
    smoke.py --device cpu    small cases under Triton's interpreter, as far as a CPU goes

Prints a line of JSON a case. A few rows may differ from the oracle (exponentials and sums round differently when
compiled); under 98% of them means that a kernel is wrong. Greedy rows must all agree.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable
from typing import Any

import jobs

Case = tuple[str, Callable[[], dict[str, Any]]]


def interpret() -> None:
    """Let Triton run kernels by its interpreter; before vLLM and Triton are imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.support import triton_stand_in  # noqa: F401

    # isort: split
    from vllm.lora.ops.triton_ops import lora_shrink_op

    configs = lora_shrink_op.get_lora_op_configs  # 64 programs share a sum: for a GPU that has little else to do
    lora_shrink_op.get_lora_op_configs = lambda *args, **options: {**configs(*args, **options), "split_k": 1}


def cases(small: bool) -> list[Case]:
    """What is looked at on a GPU, or (small) on a CPU."""
    import smoke_kernels as own
    import smoke_vllm as theirs
    import torch

    half = torch.float16 if small else torch.bfloat16  # the interpreter's products of bfloat16 are wrong
    big, little = (1500, 1000) if small else (151_936, 49_152)
    contexts = [0, 63] if small else [0, 63, 500, 1000]
    made: list[Case] = []
    if not small:
        made += [("ceilings", theirs.speed), ("vllm operators", theirs.operators)]
        made += [("fa3 smollm2 (9/3 heads of 64)", lambda: theirs.fa3(9, 3, 64))]
        made += [("fa3 qwen3-8b (32/8 heads of 128)", lambda: theirs.fa3(32, 8, 128))]
    made.append(("gate", own.gate))
    for kind in ("greedy", "soft", "one-hot", "processed", "mixed"):
        made.append((f"verify {kind} 8x3x{little}", lambda kind=kind: own.verify(8, 3, little, kind)))
    made.append((f"verify soft 4x3x{big}", lambda: own.verify(4, 3, big, "soft")))
    for kind in ("sampled", "mixed", "argmax"):
        made.append((f"draft {kind} 8x3x{little}", lambda kind=kind: own.draft(8, 3, little, kind)))
    made.append((f"draft sampled 2x3x{big}", lambda: own.draft(2, 3, big, "sampled")))
    if not small:
        made.append(("tail qwen3-8b", lambda: own.tail(contexts, 32, 8, 128)))
    made.append(("tail smollm2", lambda: own.tail(contexts, 9, 3, 64)))
    made.append(("tail in a graph", own.tail_in_a_graph))
    for shape in ("odd",) if small else ("qkv", "down"):
        made.append((f"lora {shape} in a graph", lambda shape=shape: own.lora_in_a_graph(shape, half)))
    return made


def outcome(name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a case found; an error is a finding."""
    began = time.time()
    try:
        found = run()
    except Exception as error:
        traceback.print_exc()
        found = {"ok": False, "error": f"{type(error).__name__}: {str(error)[:400]}"}
    made = {"case": name, "seconds": round(time.time() - began, 2), **found}
    print(json.dumps(made), flush=True)
    return made


def main() -> None:
    """Run every case; engines that follow take another attention where FlashAttention 3 fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if args.device == "cpu":
        interpret()
    import smoke_kernels

    smoke_kernels.use(args.device)
    todo = cases(small=args.device == "cpu")
    jobs.gate()
    found = [outcome(name, run) for name, run in todo]
    if any(f["case"].startswith("fa3") and not f["ok"] for f in found):
        (jobs.TMP / "gpukit-backend").write_text("TRITON_ATTN")
        print("FlashAttention 3 does not work here: the engines that follow take TRITON_ATTN", flush=True)
    jobs.result({"job": "smoke", "ok": all(f["ok"] for f in found), "cases": found})


if __name__ == "__main__":
    main()
    jobs.leave()
