"""Copies of the repository in which tests run: what Python imports there, also in processes that tests start.

The package is installed in editable form from some checkout, perhaps another one, so a copy must come first on
PYTHONPATH. And pyproject.toml maps top-level folders below the package (kernels/ is `vllm_idlm.kernels`), which the
installed finder alone knows: it would import them from its own checkout. Links in the copy's package make them its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any


class CopyError(RuntimeError):
    """A copy cannot be made, or is not what Python imports there."""


def snapshot(root: Path, to: Path) -> Path:
    """Copy what git tracks or would track of the working tree `root` to the new folder `to`, its packages linked."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=root, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        raise CopyError(f"git cannot list the files of {root}: {listed.stderr.strip()}")
    for name in listed.stdout.split("\0"):
        source = root / name
        if name and (source.is_file() or source.is_symlink()):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, to / name, follow_symlinks=False)
    _link_packages(to)
    return to


def _link_packages(folder: Path) -> None:
    for package, place in _setuptools(folder).get("package-dir", {}).items():
        link = folder / package.replace(".", "/")
        if not link.exists():
            link.symlink_to(os.path.relpath(folder / place, link.parent), target_is_directory=True)


def _project(folder: Path) -> dict[str, Any]:
    file = folder / "pyproject.toml"
    return tomllib.loads(file.read_text()) if file.exists() else {}


def _setuptools(folder: Path) -> dict[str, Any]:
    return _project(folder).get("tool", {}).get("setuptools", {})


def copy(source: Path, to: Path) -> Path:
    """Copy a snapshot to the new folder `to`."""
    shutil.copytree(source, to, symlinks=True)
    return to


def environment(folder: Path, scratch: Path, cache: Path) -> dict[str, str]:
    """Environment of processes in the copy `folder`.

    scratch: a new folder for what they compile of it; cache: `idlm_cache`.
    """
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return {**os.environ, **own, "VLLM_IDLM_CACHE": str(cache), "VLLM_CACHE_ROOT": str(_vllm_cache(scratch))}


def idlm_cache(to: Path) -> Path:
    """Make the folder `to` this plugin's cache: what is in the user's, by links, and room for kernels with faults."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    user = Path(os.environ.get("VLLM_IDLM_CACHE") or home / "vllm-idlm").expanduser()
    _link_entries(user, to, but="kernels")
    _link_entries(user / "kernels", to / "kernels")
    return to


def _vllm_cache(scratch: Path) -> Path:
    """A cache of vLLM's without compiled graphs: they are of other source. What it knows of model classes is kept."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    user = Path(os.environ.get("VLLM_CACHE_ROOT") or home / "vllm").expanduser()
    folder = scratch / "vllm-cache"
    _link_entries(user, folder, but="torch_compile_cache")
    return folder


def _link_entries(source: Path, to: Path, but: str = "") -> None:
    to.mkdir(parents=True, exist_ok=True)
    for entry in source.iterdir() if source.is_dir() else ():
        link = to / entry.name
        if entry.name != but and entry.suffix != ".lock" and not link.exists():
            link.symlink_to(entry)


_WHERE = """
import importlib.util, json, sys
from importlib import metadata
packages, groups = json.loads(sys.argv[1])
found = {}
for name in packages:
    spec = importlib.util.find_spec(name)
    found[name] = spec and (spec.origin or [*spec.submodule_search_locations][0])
for group in groups:
    for entry in metadata.entry_points(group=group):
        if entry.module.partition(".")[0] in packages:
            found[f"{group}: {entry.module}"] = importlib.util.find_spec(entry.module).origin
            if group == "vllm.general_plugins":
                found[f"{group}: {entry.value}"] = entry.load().__code__.co_filename
print(json.dumps(found))
"""


def check_imports(folder: Path, env: dict[str, str], elsewhere: Path) -> dict[str, str]:
    """Return where Python imports the copy's packages and entry points from; CopyError if from anywhere else.

    Asked in the copy, and in the folder `elsewhere` as in a process that a test starts.
    """
    packages = [name for name in _setuptools(folder).get("packages", []) if name.count(".") < 2]
    given = json.dumps([packages, list(_project(folder).get("project", {}).get("entry-points", {}))])
    found: dict[str, str] = {}
    for place in (folder, elsewhere):
        asked = [sys.executable, "-c", _WHERE, given]
        ran = subprocess.run(asked, cwd=place, env=env, capture_output=True, text=True, check=False)
        if ran.returncode:
            raise CopyError(f"the copy's packages cannot be imported: {ran.stderr.strip()[-2000:]}")
        found = json.loads(ran.stdout.splitlines()[-1])
        for name, origin in found.items():
            if origin is None or not Path(origin).resolve().is_relative_to(folder.resolve()):
                raise CopyError(f"in {place} Python imports {name} from {origin}, not from the copy in {folder}")
    return found
