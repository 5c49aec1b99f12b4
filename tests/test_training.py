"""The layout, the forwards and the losses of training, each against the plainest form of the same thing."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from vllm_idlm.training import forward, losses
from vllm_idlm.training.layout import Sample, block_starts, lay_out, pack

VOCAB, MASK = 97, 3


def tiny(family: str):
    """A random model of a family with our attention, float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        initializer_range=0.2,
        sliding_window=None,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=forward.ATTENTION).eval()


def with_adapter(model):
    """An adapter with weights that matter around a model."""
    from peft import LoraConfig, get_peft_model

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    made = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=names)).eval()
    for name, weight in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return made


def samples(count: int, seed: int = 0) -> list[Sample]:
    """Random prompts and answers of different lengths."""
    rng = random.Random(seed)
    return [
        Sample(*([rng.randrange(VOCAB) for _ in range(rng.randint(*span))] for span in ((1, 6), (3, 14))))
        for _ in range(count)
    ]


def served(model, prefix: list[int], block: int, adapter: bool):
    """Logits of the masks of the serving forward [prefix, M1..MB], alone in transformers' own attention."""
    base = model.get_base_model() if adapter else model
    tokens = torch.tensor([prefix + [MASK] * block])
    if not adapter:
        base.set_attn_implementation("eager")
        try:
            return base(input_ids=tokens).logits[0, len(prefix) :]
        finally:
            base.set_attn_implementation(forward.ATTENTION)
    base.set_attn_implementation("eager")
    try:
        with model.disable_adapter():
            cache = base(input_ids=tokens[:, : len(prefix)], use_cache=True).past_key_values
        return base(input_ids=tokens[:, len(prefix) :], past_key_values=cache).logits[0]
    finally:
        base.set_attn_implementation(forward.ATTENTION)


@pytest.mark.parametrize("form", ["gated", "full"])
@pytest.mark.parametrize(
    ("family", "block", "tilings"),
    [(f, *b) for f in ("llama", "qwen3") for b in ((1, 1), (3, 1), (3, 3), (7, 2))]
    + [("qwen2", 3, 2), ("mistral", 3, 2)],
)
def test_every_mask_row_is_the_serving_forward(family, form, block, tilings):
    model = tiny(family)
    model = with_adapter(model) if form == "gated" else model
    made = samples(7)
    groups = [[made[i] for i in row] for row in pack([len(s) for s in made], 40)]
    assert any(len(g) > 1 for g in groups)  # packed
    assert len(groups) > 1  # and padded
    batch = lay_out(groups, block, tilings, random.Random(1))
    with torch.no_grad():
        if form == "gated":
            hidden = forward.masks(model, batch, forward.clean(model, batch), MASK)
        else:
            hidden = forward.both(model, batch, MASK)[1]
        logits = F.linear(hidden, forward.head(model))
        checked = 0
        for row, group in enumerate(groups):
            firsts = [sum(len(s) for s in group[:i]) for i in range(len(group) + 1)]
            for column in batch.real[row].nonzero()[:, 0].tolist():
                start, place = batch.start[row, column].item(), batch.place[row, column].item()
                own = max(i for i, first in enumerate(firsts) if first <= start)
                tokens = [*group[own].prompt, *group[own].answer]
                want = served(model, tokens[: start - firsts[own]], block, form == "gated")[place - start]
                torch.testing.assert_close(logits[row, column], want, atol=1e-4, rtol=0)
                checked += 1
    assert checked == int(batch.real.sum()) > 10


def test_blocks_start_where_a_forward_has_its_first_masks_and_tile_the_answer():
    starts = block_starts(prompt=5, total=20, block=3, tilings=1, rng=random.Random(0))
    assert set(starts) <= set(range(5, 19))
    assert {b - a for a, b in itertools.pairwise(starts)} == {3}
    assert block_starts(5, 20, 3, 3, random.Random(0)) == list(range(5, 19))
    assert {tuple(block_starts(5, 20, 3, 1, random.Random(i))) for i in range(20)} == {
        tuple(range(5 + o, 19, 3)) for o in range(3)
    }


def test_every_answer_of_two_tokens_has_a_mask_at_any_offset():
    for answer in range(2, 9):
        for seed in range(20):
            assert block_starts(5, 5 + answer, 4, 1, random.Random(seed))


def test_widened_batch_gives_the_same_mask_rows():
    model = tiny("llama")
    batch = lay_out([samples(2), samples(1, seed=4)], 3, 2, random.Random(0))
    wide = batch.widened(64, 96)
    with torch.no_grad():
        want = forward.masks(model, batch, forward.clean(model, batch), MASK)[batch.real]
        got = forward.masks(model, wide, forward.clean(model, wide), MASK)[wide.real]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["gated", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_flex_attention_gives_the_rows_of_the_segments(family, form, compiled, monkeypatch):
    """What a GPU runs, padded as there, on a CPU: FlexAttention has a forward here (no backward)."""
    from torch.nn.attention.flex_attention import flex_attention

    model = tiny(family)
    model = with_adapter(model) if form == "gated" else model
    batch = lay_out([samples(2), samples(4, seed=4)], 3, 2, random.Random(0))
    wide = forward.to_blocks(batch, 40)
    assert (wide.tokens.shape[1], wide.start.shape[1]) == (128, 512)

    def hidden(of):
        if form == "full":
            return forward.both(model, of, MASK)
        before = forward.clean(model, of)
        return before.hidden, forward.masks(model, of, before, MASK)

    with torch.no_grad():
        want_clean, want_masks = hidden(batch)
        monkeypatch.setattr(forward, "who_sees_whom", forward.block_mask)
        if not compiled:
            monkeypatch.setitem(forward._compiled, "flex", flex_attention)
        got_clean, got_masks = hidden(wide)
    torch.testing.assert_close(got_masks[wide.real], want_masks[batch.real], atol=1e-5, rtol=0)
    own = batch.sample >= 0
    torch.testing.assert_close(got_clean[wide.sample >= 0], want_clean[own], atol=1e-5, rtol=0)


def test_gated_adapter_leaves_clean_logits_bit_identical():
    model = tiny("llama")
    batch = lay_out([samples(3)], 3, 1, random.Random(0))
    before = forward.clean(model, batch).hidden
    assert torch.equal(forward.clean(with_adapter(model), batch).hidden, before)


def test_gated_gradient_reaches_the_adapter_only():
    model = with_adapter(tiny("qwen3"))
    batch = lay_out([samples(3)], 3, 1, random.Random(0))
    hidden = forward.masks(model, batch, forward.clean(model, batch), MASK)
    hidden.square().sum().backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    assert got == {name for name, p in model.named_parameters() if "lora_" in name}


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
