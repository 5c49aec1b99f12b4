"""Engines run in the test's own process (tests reach into them), in float32 and eagerly unless a test says so."""

import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads it when it is imported
os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # Ray's 30 s are not enough on a busy core

import importlib.util
import subprocess
from pathlib import Path

import pytest

EXPECT = "VLLM_IDLM_EXPECT"  # version of vLLM that the tests must run on: `make test-next` sets it


def pytest_configure() -> None:
    """Refuse to run on another vLLM than the one asked for, also in processes that a test starts."""
    if expected := os.environ.get(EXPECT):
        place = _vllm()
        if f"= '{expected}'" not in (place / "_version.py").read_text():
            raise pytest.UsageError(f"{EXPECT}={expected}, and Python finds another vLLM, {place}. Fix: see PYTHONPATH")
        if str(place.parent) in os.environ.get("PYTHONPATH", "").split(os.pathsep):  # else it is the environment's own
            _hold_processes_to(str(place.parent))


def pytest_report_header() -> str:
    """Say which vLLM is tested; it must not be imported yet."""
    return f"vllm: {_vllm()}"


def _vllm() -> Path:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise pytest.UsageError("Python finds no vLLM. Fix: make setup")
    return Path(spec.origin).parent


def _hold_processes_to(folder: str) -> None:
    """Make a process that would lose `folder` from its PYTHONPATH, and so run another vLLM, fail to start."""
    start = subprocess.Popen.__init__

    def checked(self, args, *more, **options):
        env = options.get("env")
        isolated = not isinstance(args, str) and "-I" in args  # these import no vLLM
        if env is not None and not isolated and folder not in env.get("PYTHONPATH", "").split(os.pathsep):
            raise AssertionError(f"{args} would not run on the vLLM in {folder}: PYTHONPATH={env.get('PYTHONPATH')}")
        return start(self, args, *more, **options)

    subprocess.Popen.__init__ = checked


@pytest.fixture(scope="session")
def smol() -> str:
    """Folder of the embedded SmolLM2-135M-Instruct checkpoint (dequantised on first use)."""
    from vllm_idlm import embedded

    return str(embedded.ensure(progress=False))


@pytest.fixture(scope="session")
def adapter() -> str:
    """Folder of the shipped gated adapter for it."""
    from vllm_idlm import zoo

    return zoo.load("smollm2-135m-risd").lora_path()


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A folder with a base model that knows the songs, and samples; nobody writes to it."""
    from tests.support import songs

    return songs.write_world(tmp_path_factory.mktemp("songs"))
