"""The compiled form of `naive.add_lora_rows` for the CPU: rows.cpp, built once and loaded as the op of this file.

The op is `torch.ops.vllm_idlm.add_lora_rows_(y, x, slots, lora_a, lora_b, output_slices)`, arguments as in naive.py,
float32 or bfloat16, `slots` a buffer of at least n entries; B is copied unless its memory is [slots, 1, rank, out].
A model enters each layer's weights in a table once, `lora_layer(lora_a, lora_b, output_slices)` gives its row (and
insists on that memory order), and calls `add_lora_layer_(y, x, slots, table, index)`: five arguments instead of up to
18. torch.compile traces both. The library is kept in the cache folder under a name
made of the source, torch, the compiler and the processor, so that a change of any builds anew; two processes that start
together build it once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from vllm_idlm.embedded import cache_root

SOURCE = Path(__file__).with_name("rows.cpp")
_FLAGS = ["-std=c++20", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"]


class BuildError(RuntimeError):
    """rows.cpp could not be built here: why, and the fix."""


def _compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        raise BuildError("no C++ compiler found: install g++ (Debian, Ubuntu: apt-get install g++), or set CXX")
    return found


def _processor() -> str:
    """What -march=native depends on: the machine's name and its instruction set flags."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    return platform.processor()


def library_path() -> Path:
    """Where the built library lies, built or not; `BuildError` without a compiler."""
    parts = [SOURCE.read_text(), torch.__version__, _compiler(), *_FLAGS, platform.machine(), _processor()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return cache_root() / "kernels" / f"lora_rows-{key}.so"


def _command(target: Path) -> list[str]:
    base = Path(torch.__file__).parent
    includes = [f"-I{base / 'include'}", f"-I{base / 'include/torch/csrc/api/include'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    return [
        _compiler(),
        *_FLAGS,
        abi,
        *includes,
        str(SOURCE),
        "-o",
        str(target),
        f"-L{base / 'lib'}",
        "-ltorch_cpu",
        "-lc10",
    ]


def build() -> Path:
    """The library's path, built if need be (15 s, once); `BuildError` with the compiler's own words if that fails."""
    path = library_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
                made = Path(scratch) / path.name
                ran = subprocess.run(_command(made), capture_output=True, text=True)
                if ran.returncode:
                    raise BuildError(f"{_compiler()} failed on {SOURCE.name}: {ran.stderr.strip()[-2000:]}")
                made.replace(path)
    return path


@contextlib.contextmanager
def _locked(path: Path):
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def load() -> None:
    """Build and load the op into this process; `BuildError` if it cannot be had here."""
    try:
        torch.ops.load_library(str(build()))
    except OSError as error:
        raise BuildError(f"cannot write or load the library below {cache_root()}: {error}") from error
    for op in ("add_lora_rows_", "add_lora_layer_"):
        torch.library.register_fake(f"vllm_idlm::{op}", lambda *_: None)  # nothing is returned, y is changed


def table(entries: list[list[int]]) -> torch.Tensor:
    """[layers, fields] int64: the rows from `lora_layer`, padded to one length, for `add_lora_layer_`."""
    width = max(map(len, entries))
    return torch.tensor([entry + [0] * (width - len(entry)) for entry in entries])
