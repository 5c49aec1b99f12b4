"""C++ sources of this package as libraries of torch ops: built once by the user's compiler, kept, loaded.

A library is kept in the cache folder under a name made of its source, torch, the compiler and the processor, so that a
change of any builds anew; two processes that start together build it once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from vllm_idlm.embedded import cache_root

_FLAGS = ["-std=c++20", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"]


class BuildError(RuntimeError):
    """A source could not be built here: why, and the fix."""


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


def library_path(source: Path) -> Path:
    """Where the library of `source` lies, built or not; `BuildError` without a compiler."""
    parts = [source.read_text(), torch.__version__, _compiler(), *_FLAGS, platform.machine(), _processor()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return cache_root() / "kernels" / f"{source.parent.name}_{source.stem}-{key}.so"


def _command(source: Path, target: Path) -> list[str]:
    base = Path(torch.__file__).parent
    includes = [f"-I{base / 'include'}", f"-I{base / 'include/torch/csrc/api/include'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    libraries = [f"-L{base / 'lib'}", "-ltorch_cpu", "-lc10"]
    return [_compiler(), *_FLAGS, abi, *includes, str(source), "-o", str(target), *libraries]


def build(source: Path) -> Path:
    """The library's path, built if need be (15 s, once); `BuildError` with the compiler's own words if that fails."""
    path = library_path(source)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
                made = Path(scratch) / path.name
                ran = subprocess.run(_command(source, made), capture_output=True, text=True)
                if ran.returncode:
                    raise BuildError(f"{_compiler()} failed on {source.name}: {ran.stderr.strip()[-2000:]}")
                made.replace(path)
    return path


@contextlib.contextmanager
def _locked(path: Path):
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def load(source: Path, *ops: str) -> None:
    """Build and load the ops of `source`, each `vllm_idlm::name`; `BuildError` if they cannot be had here.

    The named ops return nothing and change their first argument, which is all that torch.compile needs to know of them;
    others register what they return themselves.
    """
    try:
        torch.ops.load_library(str(build(source)))
    except OSError as error:
        raise BuildError(f"cannot write or load the library below {cache_root()}: {error}") from error
    for op in ops:
        torch.library.register_fake(f"vllm_idlm::{op}", lambda *_: None)
