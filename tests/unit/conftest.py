"""No unit test sees a user's own zoo; those of patches write a source tree in the place of vLLM's."""

from __future__ import annotations

import functools

import pytest


@pytest.fixture(autouse=True)
def _no_user_zoo(monkeypatch):
    monkeypatch.delenv("VLLM_IDLM_CONFIGS", raising=False)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with a base model that knows nothing yet, and samples; nobody writes to it."""
    from tests.support import songs

    return songs.write_world(tmp_path_factory.mktemp("songs"), steps=0)


@pytest.fixture
def tree(tmp_path):
    """A function that writes files below a folder, as a source tree of vLLM's."""
    from tests.support.sources import write_tree

    return functools.partial(write_tree, tmp_path)
