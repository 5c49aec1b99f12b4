"""Engines run in the test's own process (tests reach into them), in float32 and eagerly unless a test says so."""

import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads it when it is imported
os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # Ray's 30 s are not enough on a busy core

import pytest


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
