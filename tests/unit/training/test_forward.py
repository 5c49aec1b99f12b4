"""The forwards of training: every mask row is the serving forward, by every way of attention."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from vllm_idlm.training import forward
from vllm_idlm.training.layout import Sample, lay_out, pack

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


def test_other_architectures_are_refused_by_name(tmp_path):
    from transformers import AutoConfig

    from vllm_idlm.training import forward

    with pytest.raises(ValueError, match=r"architecture 'gpt2' cannot be trained; allowed are llama, mistral"):
        forward.check_family(AutoConfig.for_model("gpt2"))
    with pytest.raises(ValueError, match="sliding window of 4096"):
        forward.check_family(AutoConfig.for_model("mistral", sliding_window=4096))
