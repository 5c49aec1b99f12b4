"""The losses of training: in chunks and compiled they are those of the formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from tests.unit.training.test_forward import VOCAB
from vllm_idlm.training import losses


def naive_loss(hidden, head, anchor_hidden, tokens, weights, names):
    q = F.softmax(hidden @ head.T, -1)
    p = F.softmax(anchor_hidden @ head.T, -1)
    ce = -q.gather(1, tokens[:, None])[:, 0].log()
    kl = (p * (p.log() - q.log())).sum(-1)
    tv = (p - q).abs().sum(-1) / 2
    return (weights * (names.get("ce", 0) * ce + names.get("kl", 0) * kl + names.get("tv", 0) * tv)).sum()


@pytest.mark.parametrize("names", [{"ce": 1.0}, {"kl": 1.0}, {"tv": 1.0}, {"ce": 0.5, "kl": 2.0, "tv": 0.7}], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_chunked_loss_and_its_gradient_are_those_of_the_formula(names, compiled, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * VOCAB * 7)  # seven rows a chunk, and a rest
    monkeypatch.setattr(losses, "COMPILE_FROM", 0 if compiled else 1 << 40)
    torch.manual_seed(0)
    hidden, anchor, weights = torch.randn(45, 16, requires_grad=True), torch.randn(45, 16), torch.rand(45)
    head, tokens = torch.randn(VOCAB, 16), torch.randint(VOCAB, (45,))
    want = naive_loss(hidden, head, anchor, tokens, weights, names)
    got, measured = losses.fused(hidden, head, losses.Target(tokens, anchor, head), weights, names)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)
    theirs, ours = (torch.autograd.grad(3 * loss, hidden)[0] for loss in (want, got))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    p, q = F.softmax(anchor @ head.T, -1), F.softmax(hidden @ head.T, -1)
    torch.testing.assert_close(measured.overlap, torch.minimum(p, q).sum(-1), atol=1e-5, rtol=0)
    assert torch.equal(measured.greedy, p.argmax(-1) == q.argmax(-1))
    assert set(measured.losses) == set(names)


def test_loss_without_an_anchor_trains_the_head_too():
    torch.manual_seed(0)
    hidden, head = torch.randn(45, 16, requires_grad=True), torch.randn(VOCAB, 16, requires_grad=True)
    tokens, weights = torch.randint(VOCAB, (45,)), torch.full((45,), 1 / 45)
    want = torch.autograd.grad(F.cross_entropy(hidden @ head.T, tokens), [hidden, head])
    got, _ = losses.fused(hidden, head, losses.Target(tokens, None, None), weights, {"ce": 1.0})
    for ours, theirs in zip(torch.autograd.grad(got, [hidden, head]), want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_unknown_loss_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'js' is unknown; allowed are ce, kl, tv"):
        losses.check_names({"js": 1.0})
    with pytest.raises(ValueError, match="every weight is 0"):
        losses.check_names({"kl": 0.0})
