"""The prefix cache under Model Runner V2: read after every step, as tests/engine does on V1."""

from __future__ import annotations

import pytest

from tests.engine.test_scheduler_prefix_cache import (
    finds_a_block_cached_too_early,
    folders,
    holds_what_plain_decoding_would,
    start,
)

pytestmark = pytest.mark.vllm
__all__ = ["folders"]  # a fixture


@pytest.mark.parametrize("coverage", [pytest.param("last", marks=pytest.mark.slow), "all"])
def test_cached_blocks_hold_what_plain_decoding_would(folders, coverage, monkeypatch):
    """With asynchronous scheduling, which hands out blocks a step ahead."""
    llm = start(folders, coverage, async_scheduling=True)
    assert llm.llm_engine.vllm_config.use_v2_model_runner
    holds_what_plain_decoding_would(llm, folders, monkeypatch)


def test_a_block_cached_too_early_is_found(folders, monkeypatch):
    finds_a_block_cached_too_early(start(folders, "all", async_scheduling=True), folders, monkeypatch)
