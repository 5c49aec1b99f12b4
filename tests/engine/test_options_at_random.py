"""Random legal combinations of every sampling option, prompt lengths and prefixes, in caches too small: as plain.

Requests with one right answer are compared with plain decoding, seeded ones with themselves in other company. A failure
is made as small as hypothesis can make it, and shown as a program of five lines.
"""

from __future__ import annotations

import pytest

from tests.support.random_requests import METHODS, World, answers_as_plain_decoding

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def world(smol, tmp_path_factory):
    return World.write(tmp_path_factory.mktemp("random"), smol)


@pytest.mark.parametrize("batches", [8, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_answers_as_plain_decoding(world, method, batches):
    answers_as_plain_decoding(world, method, batches, most=12)
