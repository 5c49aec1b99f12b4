"""Random legal combinations of every sampling option on Model Runner V2, as tests/engine/test_options_at_random.py."""

from __future__ import annotations

import pytest

from tests.support.random_requests import METHODS, World, answers_as_plain_decoding

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World.write(tmp_path_factory.mktemp("random"), None)


@pytest.mark.parametrize("method", METHODS)
def test_answers_as_plain_decoding(world, method):
    answers_as_plain_decoding(world, method, batches=20, most=8, async_scheduling=True)
