"""Compile every Triton kernel for an H100 (sm_90), down to machine code, on a machine without a GPU.

    python -m tests.support.compile_kernels

Prints registers and stack of each (a stack is spilled registers). vLLM hands out the real Triton only if it believes in
a driver, so a stand-in backend is there while it is imported; Triton's own compiler and ptxas then do the rest.
"""

import re
import subprocess
import tempfile
from pathlib import Path

from tests.support import triton_stand_in  # noqa: F401 (before vLLM, which the kernels import)

# isort: split
import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vllm_idlm.kernels.draft import triton as draft
from vllm_idlm.kernels.gate import triton as gate
from vllm_idlm.kernels.tail import triton as tail
from vllm_idlm.kernels.verify import triton as verify

del backends["cpu"]  # Triton's compiler asks every backend

FLOATS, INTS, LONGS = "*fp32", "*i32", "*i64"
_TYPES = {
    **dict.fromkeys(
        ("p_max", "p_sum", "q_max", "q_sum", "race_value", "plain_value", "values", "temperatures"), FLOATS
    ),
    **dict.fromkeys(("p_best", "race_index", "plain_index", "indices", "accepted_out", "accepted_in", "emitted"), INTS),
    **dict.fromkeys(
        ("first_row", "num_drafts", "counts", "query_start", "logits_start", "seq_len", "prefill_len"), INTS
    ),
    **dict.fromkeys(("out_drafts", "out_masks"), INTS),
    **dict.fromkeys(
        ("drafts", "positions", "slots", "seeds", "tokens", "own", "token_adapter", "logits_adapter"), LONGS
    ),
    "processed": FLOATS,
    "processed_first": LONGS,
}


# The tail kernels of Qwen3-8B: 9 rows of 4 heads.
_TAIL = {**dict.fromkeys(("part_max", "part_sum", "part_out"), FLOATS), "scale": "fp32"}
_TAIL |= dict.fromkeys(("table", "starts", "rows"), INTS)
_TAIL_SIZES = {"GROUP": 4, "SIZE": 128, "PADDED": 128, "M": 64}


def _typed(dtype: str) -> dict[str, str]:
    return dict.fromkeys(("query", "key", "value", "output"), f"*{dtype}")


def compiled(kernel, dtype: str = "bf16", other: dict | None = None, warps: int = 4, **constants) -> str:
    """Machine code of a kernel for sm_90; returns what ptxas used. other: types that are not the usual ones."""
    types = {**_TYPES, "logits": f"*{dtype}", "proposal": f"*{dtype}", **(other or {})}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    return _usage(made.asm["cubin"])


def _usage(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    return f"{found.group(1)} registers, {found.group(2)} bytes of stack"


def main() -> None:
    """Every kernel, in every form that changes its code."""
    for dtype in ("bf16", "fp32"):
        for proposal, processed in ((True, False), (False, False), (True, True)):
            flags = {"HAS_PROPOSAL": proposal, "HAS_PROCESSED": processed, "WIDTH": 4}
            other = {} if processed else {"processed": f"*{dtype}", "processed_first": INTS}
            print(
                "verify.row_stats",
                dtype,
                flags,
                compiled(verify._row_stats, dtype, other, BLOCK=verify.STATS_BLOCK, **flags),
            )
            sizes = {"BLOCK": verify.RACE_BLOCK, "BLOCKS": 64}
            print("verify.race", dtype, flags, compiled(verify._race, dtype, other, **sizes, **flags))
        print("draft.race", dtype, compiled(draft._race, dtype, MOST=3, BLOCK=draft.BLOCK, SAMPLED=True))
    for dtype in ("bf16", "fp16"):
        types, sizes = _TAIL | _typed(dtype), {"TOKENS": 16, "TILE": tail.TILE, "WIDE": False}
        for splits in (1, 2, 4, tail.SPLITS):
            own = {**_TAIL_SIZES, "SPLITS": splits}
            print("tail.stretch", dtype, splits, compiled(tail._stretch, dtype, types, tail.WARPS, **own, **sizes))
            print("tail.join", dtype, splits, compiled(tail._join, dtype, types, **own))
    print("verify.finish", compiled(verify._finish, WIDTH=4, PADDED=4, BLOCKS=64, RACE_BLOCKS=256))
    print("draft.race greedy", compiled(draft._race, MOST=3, BLOCK=draft.BLOCK, SAMPLED=False))
    print("draft.pick", compiled(draft._pick, MOST=3, BLOCKS=256))
    print("gate", compiled(gate._gate, other={"drafts": INTS}, BLOCK=gate.BLOCK))


if __name__ == "__main__":
    main()
