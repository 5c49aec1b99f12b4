"""Machine code for GPUs in extension modules: leaves in what one kind of GPU needs.

The code of kernels lies in the section .nv_fatbin, as fatbins of several images each, one a kind of GPU. A fatbin is
made anew where it stands, of the images that stay, with its size set and zeros behind; where none stays it holds one
small image for another kind of GPU, which the driver passes over as it passes over a library built for other GPUs. Code
of the host and its addresses stay as they are.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from versions import Version

HOPPER, OTHER = 90, 75  # sm_90; the kind of the image that stands for nothing
MACHINE_CODE = 2  # kind of an image
_MAGIC = 0xBA55ED50
_ZSTD, _LZ4 = 0x8000, 0x2000


class Image(NamedTuple):
    """One image of a fatbin."""

    fatbin: int  # its offset in the file, like `start`
    start: int
    head: int  # bytes of its header
    length: int  # and behind it
    kind: int
    arch: int
    flags: int
    packed: int  # bytes if it is compressed
    whole: int  # and unpacked

    def of(self, data: bytes | bytearray) -> bytes:
        """Its bytes in a file, header and all."""
        return bytes(data[self.start : self.start + self.head + self.length])


def sections(data: bytes | bytearray) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of the sections of an ELF file."""
    (at,) = struct.unpack_from("<Q", data, 0x28)
    each, count, names = struct.unpack_from("<HHH", data, 0x3A)
    found = [struct.unpack_from("<IIQQQQ", data, at + i * each) for i in range(count)]
    for name, *_, offset, size in found:
        begin = found[names][4] + name
        yield bytes(data[begin : data.index(b"\0", begin)]).decode(), offset, size


def images(data: bytes | bytearray) -> Iterator[Image]:
    """All images of an ELF file."""
    for name, offset, size in sections(data):
        at = offset
        while name == ".nv_fatbin" and at < offset + size:
            magic, _, header, body = struct.unpack_from("<IHHQ", data, at)
            if magic != _MAGIC:
                at += 8
                continue
            image, end = at + header, at + header + body
            while image < end:
                kind, _, head, length = struct.unpack_from("<HHIQ", data, image)
                packed, _, _, _, arch, _, _, flags, _, whole = struct.unpack_from("<IIHHIIIQQQ", data, image + 16)
                yield Image(at, image, head, length, kind, arch, flags, packed, whole)
                image += head + length
            at = end


def kernels(data: bytes | bytearray, image: Image) -> str:
    """The demangled names of an image's kernels, a line each; "?" if it cannot be unpacked."""
    raw = image.of(data)[image.head :]
    if image.flags & _ZSTD:
        import zstandard

        raw = zstandard.ZstdDecompressor().decompress(raw[: image.packed], max_output_size=image.whole)
    elif image.flags & _LZ4:
        return "?"  # not seen in vLLM's wheel
    names = "\n".join(name.removeprefix(".text.") for name, *_ in sections(raw) if name.startswith(".text."))
    return subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True).stdout


def placeholder(path: Path) -> bytes:
    """The smallest image for another kind of GPU in a module: what an emptied fatbin holds."""
    data = path.read_bytes()
    return min((i.of(data) for i in images(data) if (i.kind, i.arch) == (MACHINE_CODE, OTHER)), key=len)


def stays(data: bytes | bytearray, image: Image, module: str, version: Version) -> bool:
    """Whether an image is machine code for Hopper that is called."""
    if (image.kind, image.arch) != (MACHINE_CODE, HOPPER):
        return False
    names = kernels(data, image)
    rule = next((rule for part, rule in version.keep if part in module), None)
    if rule is not None:
        return bool(rule.search(names))
    return not version.leave.search(names) or bool(version.keep_anyway.search(names))


def cut(path: Path, tiny: bytes, version: Version) -> str:
    """Leave in a module what a Hopper GPU needs; says what was done. tiny: see `placeholder`."""
    data = bytearray(path.read_bytes())
    fatbins: dict[int, list[Image]] = {}
    for image in images(data):
        fatbins.setdefault(image.fatbin, []).append(image)
    kept = [image for found in fatbins.values() for image in found if stays(data, image, path.name, version)]
    contents = {at: b"".join(i.of(data) for i in kept if i.fatbin == at) or tiny for at in fatbins}
    for at, content in contents.items():
        header, size = struct.unpack_from("<HQ", data, at + 6)
        if len(content) > size:
            raise SystemExit(f"{path}: a fatbin of {size} bytes has no room for {len(content)}")
        struct.pack_into("<Q", data, at + 8, len(content))
        data[at + header : at + header + size] = content + bytes(size - len(content))
    path.write_bytes(data)
    strip(path)
    gone = sum(map(len, fatbins.values())) - len(kept)
    return f"{path.name}: {len(kept)} images of {sum(i.length for i in kept) / 2**20:.1f} MiB stay, {gone} are gone"


def strip(path: Path) -> None:
    """Leave out symbols that nobody needs, where there is a `strip` and it can."""
    if shutil.which("strip"):
        before = path.read_bytes()
        if subprocess.run(["strip", "--strip-unneeded", str(path)], capture_output=True, check=False).returncode:
            path.write_bytes(before)
