"""The identity of a checkpoint, told in milliseconds: a hash over its tensors, whatever files they are spread over.

It is read when an engine starts, so of each tensor only the first bytes are: enough to tell one checkpoint from another
of the same architecture. It recognises; it does not protect against forgery.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

SAMPLE_BYTES = 4096  # of each tensor


class FingerprintError(ValueError):
    """The folder holds no readable safetensors checkpoint."""


def fingerprint(folder: str | Path) -> str:
    """SHA-256 (hex) over every tensor of the folder's *.safetensors, by name: name, dtype, shape, first bytes.

    The same tensors give the same fingerprint however they are cut into files. Raises FingerprintError without any.
    """
    sources = sorted(Path(folder).glob("*.safetensors"))
    if not sources:
        raise FingerprintError(f"{folder}: no *.safetensors, so no fingerprint; give a checkpoint in that format")
    tensors = {name: (file, entry) for file in sources for name, entry in _header(file).items()}
    digest = hashlib.sha256()
    for name in sorted(tensors):
        file, (dtype, shape, begin, end) = tensors[name]
        digest.update(json.dumps([name, dtype, shape]).encode())
        with file.open("rb") as stream:
            stream.seek(begin)
            wanted = min(SAMPLE_BYTES, end - begin)
            sample = stream.read(wanted)
        if len(sample) < wanted:
            raise FingerprintError(f"{file} ends before its last tensor; download the checkpoint again")
        digest.update(sample)
    return digest.hexdigest()


def other_base(record: dict[str, Any], folder: str | Path) -> tuple[str, str] | None:
    """The recorded base and the folder's fingerprint in words, if an isd.json names another base than `folder`.

    None if it is the same or the record names none. Raises FingerprintError as `fingerprint` does.
    """
    want = record.get("base_fingerprint")
    if want is None or (found := fingerprint(folder)) == want:
        return None
    return f"{record.get('base')} (fingerprint {want[:12]})", f"(fingerprint {found[:12]})"


def _header(file: Path) -> dict[str, tuple[str, list[int], int, int]]:
    """Name -> dtype, shape, first and last byte in the file, of each tensor."""
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if size > file.stat().st_size:
                raise ValueError("its header is longer than the file")
            entries = json.loads(stream.read(size))
        entries.pop("__metadata__", None)
        base = 8 + size
        return {n: (e["dtype"], e["shape"], *(base + at for at in e["data_offsets"])) for n, e in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FingerprintError(f"{file} is no whole safetensors file ({error}); download it again") from None
