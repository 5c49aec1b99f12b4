"""The objective of training: gradient checkpointing gives the same gradients."""

from __future__ import annotations

import pytest
import torch

from tests.support.training import run, settings


@pytest.mark.heavy
@pytest.mark.parametrize("form", ["gated", "full"])
def test_gradient_checkpointing_gives_the_same_gradients(world, tmp_path, form):
    found = []
    for checkpointing in (False, True):
        loss = {"ce": 1.0} if form == "full" else {"kl": 1.0}
        made = settings(world, tmp_path / "run", form=form, loss=loss, gradient_checkpointing=checkpointing)
        trained = run(made)
        trained.objective.train()
        trained.objective(next(trained.stream.steps(0))[0]).backward()
        found.append({n: p.grad for n, p in trained.objective.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() != set()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-6, rtol=1e-4)
