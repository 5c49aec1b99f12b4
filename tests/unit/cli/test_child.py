"""A command's child process: what is told where it fails."""

from __future__ import annotations

import pytest


@pytest.mark.heavy
def test_an_engine_that_fails_ends_with_the_reason(monkeypatch, tmp_path):
    """A model that is not there: the child's own words and the end of its log, and no process left."""
    from vllm_idlm.cli import _run, child

    run = _run.Run({"model": str(tmp_path / "none")}, ["x"], 2, 0.0, 1)
    with pytest.raises(child.RunError, match=r"(?s)none.*The last lines of"):
        child.run(run, lambda _: None, lambda *_: None, verbose=False)
