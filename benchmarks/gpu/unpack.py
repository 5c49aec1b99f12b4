#!/usr/bin/env python3
"""On the device, from the repository's root: checks and unpacks the blobs of every part that is there.

    python3 .gpukit/kit/unpack.py [--site DIR] [--store DIR] [--no-convert]

Can be run again and again: whatever has come is put to use at once, vLLM and its packages in the site folder, the GGUF
and the adapter as soon as their last blob is there (blobs of an earlier call are kept in the store). Standard library,
and numpy for the GGUF.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

KIT = Path(__file__).resolve().parent
TMP = Path(os.environ.get("GPUKIT_TMP", "/tmp"))


def write(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.rename(path)


def one(entry: dict[str, Any], store: Path, site: Path) -> str:
    """Unpack one blob of the manifest; says what became of it: there, missing, CORRUPT or unpacked."""
    name = entry["name"]
    if (store / name).exists():
        return "there"
    path = KIT.parent / f"p{entry['part']}" / f"{name}.xz"
    if not path.exists():
        return "missing"
    packed = path.read_bytes()
    if hashlib.sha256(packed).hexdigest() != entry["sha256"]:
        return "CORRUPT"
    data = lzma.decompress(packed)  # other blobs go on meanwhile: it lets go of the interpreter's lock
    if entry["kind"] == "tar":
        with tarfile.open(fileobj=io.BytesIO(data)) as content:
            for member in content.getmembers():  # tarfile fails where another blob makes the same folder meanwhile
                (site / member.name).parent.mkdir(parents=True, exist_ok=True)
            content.extractall(site, filter="data")
        data = b""
    write(store / name, data)
    return "unpacked"


def register(site: Path, repo: Path) -> None:
    """Make the project's entry points known (vLLM finds its plugin by them), and have sitecustomize.py loaded."""
    for name in ("sitecustomize.py", "shims.py"):
        write(site / name, (KIT / name).read_bytes())
    project = tomllib.loads((repo / "pyproject.toml").read_text())["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    text = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    write(info / "METADATA", text.encode())
    groups = {"console_scripts": project["scripts"], **project["entry-points"]}
    sections = ("\n".join([f"[{g}]", *(f"{k} = {v}" for k, v in of.items()), ""]) for g, of in groups.items())
    write(info / "entry_points.txt", "\n".join(sections).encode())


def adapter(store: Path, repo: Path) -> None:
    """Put the shipped adapter together (it is emptied in the working tree that a call carries)."""
    plan = json.loads((store / "adapter-plan").read_bytes())
    target = repo / plan["file"]
    if target.exists() and target.stat().st_size == plan["size"]:
        return
    low, high = (store / "adapter-0").read_bytes(), (store / "adapter-1").read_bytes()
    head, low = low[: plan["header"]], low[plan["header"] :]
    body = bytearray(len(low) + len(high))
    body[0::2], body[1::2] = low, high
    checked(target, head + bytes(body), plan["sha256"])


def smol(store: Path, site: Path) -> None:
    """Put SmolLM2's GGUF together, of streams of like bytes and what stands between its blocks."""
    plan = json.loads((store / "smol-plan").read_bytes())
    target = site / plan["file"]
    if target.exists() and target.stat().st_size == plan["size"]:
        return
    streams, rest = Streams(store, plan), io.BytesIO((store / "smol-others").read_bytes())
    out = bytearray()
    for kind, begin, length in plan["spans"]:
        out += rest.read(begin - len(out))
        out += streams.blocks(kind, length)
    checked(target, bytes(out + rest.read()), plan["sha256"])


def checked(target: Path, data: bytes, wanted: str) -> None:
    """Write what was put together, if it came out right."""
    if hashlib.sha256(data).hexdigest() != wanted:
        raise SystemExit(f"gpukit: {target.name} does not come out right")
    write(target, data)


class Streams:
    """The bytes of all quantised blocks of a kind: a stream for each place in a block's head, one for the rest."""

    def __init__(self, store: Path, plan: dict[str, Any]) -> None:
        self._heads, self._sizes = plan["heads"], plan["sizes"]
        self._open: dict[str, io.BytesIO] = {}
        for kind, head in self._heads.items():
            for part in (*map(str, range(head)), "rest"):
                pieces = sorted(store.glob(f"smol-{kind}-{part}.*"))
                self._open[f"{kind}-{part}"] = io.BytesIO(b"".join(p.read_bytes() for p in pieces))

    def blocks(self, kind: str, length: int) -> bytes:
        """The next `length` bytes of whole blocks."""
        import numpy as np

        head, size = self._heads[kind], self._sizes[kind]
        made = np.empty((length // size, size), np.uint8)
        for i in range(head):
            made[:, i] = np.frombuffer(self._open[f"{kind}-{i}"].read(len(made)), np.uint8)
        rest = self._open[f"{kind}-rest"].read(len(made) * (size - head))
        made[:, head:] = np.frombuffer(rest, np.uint8).reshape(len(made), -1)
        return made.tobytes()


def checkpoint(site: Path, repo: Path, wait: bool) -> None:
    """Have SmolLM2's checkpoint made of the GGUF, in the background unless `wait`: jobs that need it wait for it."""
    cache = Path(os.environ.get("VLLM_IDLM_CACHE", TMP / "idlm-cache"))
    env = {**os.environ, "PYTHONPATH": str(site), "GPUKIT_REPO": str(repo), "VLLM_IDLM_CACHE": str(cache)}
    code = "from vllm_idlm import embedded; print('checkpoint', embedded.ensure(progress=False))"
    with (TMP / "gpukit-checkpoint.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", code], env=env, cwd=repo, stdout=log, stderr=log, start_new_session=True
        )
    if wait:
        process.wait()
        print((TMP / "gpukit-checkpoint.log").read_text()[-1500:].strip(), flush=True)


def assemble(here: set[str], names: set[str], store: Path, site: Path, repo: Path) -> list[str]:
    """Put together what has all its blobs."""
    made = []
    for what, prefix, put in (("adapter", "adapter", adapter), ("smollm2", "smol", smol)):
        wanted = {name for name in names if name.startswith(prefix)}
        if wanted and wanted <= here:
            put(store, repo if what == "adapter" else site)
            made.append(what)
    return made


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", type=Path, default=Path(os.environ.get("GPUKIT_SITE", TMP / "site")))
    parser.add_argument("--store", type=Path, default=TMP / "gpukit-store")
    parser.add_argument("--repo", type=Path, default=KIT.parent.parent)
    parser.add_argument("--no-convert", action="store_true", help="do not make SmolLM2's checkpoint yet")
    parser.add_argument("--wait", action="store_true", help="make that checkpoint before returning")
    return parser.parse_args()


def main() -> None:
    """Unpack what is there, and say so; exit status 1 if a blob is corrupt."""
    began, args = time.time(), arguments()
    site, store, repo = args.site, args.store, args.repo.resolve()
    site.mkdir(parents=True, exist_ok=True)
    store.mkdir(parents=True, exist_ok=True)
    manifest = json.loads((KIT / "manifest.json").read_text())["blobs"]
    order = sorted(manifest, key=lambda name: -manifest[name]["raw"])
    with ThreadPoolExecutor(min(16, os.cpu_count() or 4)) as pool:
        state = dict(zip(order, pool.map(lambda name: one(manifest[name], store, site), order), strict=True))
    register(site, repo)
    here = {name for name, s in state.items() if s in ("there", "unpacked")}
    made = assemble(here, set(manifest), store, site, repo)
    bad = [name for name, s in state.items() if s == "CORRUPT"]
    missing = sorted({manifest[name]["part"] for name, s in state.items() if s == "missing"})
    print(
        f"gpukit: {len(here)} of {len(manifest)} blobs here in {time.time() - began:.1f} s; assembled: "
        f"{', '.join(made) or 'nothing'}; parts still to come: {missing or 'none'}"
        + (f"; CORRUPT: {bad}" if bad else ""),
        flush=True,
    )
    if "smollm2" in made and not args.no_convert:
        checkpoint(site, repo, args.wait)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
