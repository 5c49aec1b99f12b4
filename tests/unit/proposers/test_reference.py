"""The reference decoder: equal to plain decoding whatever is drafted, sampled answers included."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from vllm_idlm.proposers.reference import GatedLoRA, Trace, decode

from tests.support.stats import chi_square, chi_square_two
from tests.support.tiny import load_tiny, write_adapter, write_tiny

ALPHA = 0.01
MASK = 4
PROMPT = [3, 1, MASK, 2]  # with the mask token as an ordinary one
MAX_TOKENS = 25


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def tiny(request, tmp_path_factory):
    """A tiny model of each kind, and a random adapter for it: (model, adapter folder)."""
    folder = tmp_path_factory.mktemp(request.param)
    path = write_tiny(folder / "model", kind=request.param)
    return load_tiny(path), write_adapter(folder / "adapter", path)


@pytest.fixture
def lora(tiny):
    model, path = tiny
    gated = GatedLoRA(model, path)
    yield gated
    gated.remove()


def _plain(model, prompt: list[int], count: int) -> list[int]:
    sequence = torch.tensor([prompt])
    with torch.inference_mode():
        for _ in range(count):
            logits = model(input_ids=sequence).logits[:, -1]
            sequence = torch.cat([sequence, logits.argmax(-1, keepdim=True)], 1)
    return sequence[0, len(prompt) :].tolist()


def _check_chain(trace: Trace, n: int) -> None:
    """What every trace must satisfy: the forwards are a chain of cold and verify forwards that emit the tokens."""
    handed = trace.proposals
    for forward in trace.forwards:
        assert forward.kind == ("verify" if forward.drafts else "cold")
        assert forward.drafts == handed[: len(forward.drafts)]
        assert bool(handed) == bool(forward.drafts)
        assert forward.emitted[: forward.accepted] == forward.drafts[: forward.accepted]
        assert len(forward.emitted) == forward.accepted + 1 <= n
        rejected = forward.accepted < len(forward.drafts)
        assert len(forward.proposals) == (0 if rejected else forward.masks)
        handed = forward.proposals
    assert trace.tokens[1:] == [t for forward in trace.forwards for t in forward.emitted]


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_greedy_equals_plain_with_an_adapter_that_drafts_badly(tiny, lora, n):
    model, _ = tiny
    trace = decode(model, PROMPT, n=n, mask_token_id=MASK, max_tokens=MAX_TOKENS, lora=lora)
    assert trace.tokens == _plain(model, PROMPT, MAX_TOKENS)
    _check_chain(trace, n)
    assert any(forward.accepted < len(forward.drafts) for forward in trace.forwards) == (n > 1)


@pytest.mark.parametrize("cold", [0, 1], ids=["prompt with masks", "prompt without"])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_right_drafts_give_n_tokens_a_forward(tiny, n, cold):
    model, _ = tiny
    answer = _plain(model, PROMPT, 1 + cold + 3 * n)  # the prompt's token, a cold forward's, three full forwards

    def oracle(tokens: list[int], m: int) -> list[int]:
        done = len(tokens) - len(PROMPT)
        return answer[done : done + m]

    options = {"n": n, "mask_token_id": MASK, "max_tokens": len(answer), "prompt_masks": not cold}
    trace = decode(model, PROMPT, oracle=oracle, **options)
    assert trace.tokens == answer
    assert [forward.kind for forward in trace.forwards] == ["cold"] * cold + ["verify"] * 3
    assert [len(forward.emitted) for forward in trace.forwards] == [1] * cold + [n] * 3
    assert trace.tpf == (cold + 3 * n) / (cold + 3)
    _check_chain(trace, n)


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_a_wrong_draft_is_replaced_and_the_next_forward_is_cold(tiny, wrong):
    model, _ = tiny
    answer = _plain(model, PROMPT, MAX_TOKENS)

    def oracle(tokens: list[int], m: int) -> list[int]:
        done = len(tokens) - len(PROMPT)
        drafts = answer[done : done + m]
        drafts[wrong:] = [(d + 1) % 48 for d in drafts[wrong:]]
        return drafts

    trace = decode(model, PROMPT, n=4, mask_token_id=MASK, max_tokens=MAX_TOKENS, oracle=oracle)
    assert trace.tokens == answer
    _check_chain(trace, 4)
    assert [f.kind for f in trace.forwards[:4]] == ["verify", "cold", "verify", "cold"]
    assert [f.accepted for f in trace.forwards[:4]] == [wrong, 0, wrong, 0]


def test_ends_at_the_end_of_sequence_token(tiny):
    model, _ = tiny
    answer = _plain(model, PROMPT, MAX_TOKENS)
    eos = answer[10]
    trace = decode(
        model,
        PROMPT,
        n=4,
        mask_token_id=MASK,
        max_tokens=MAX_TOKENS,
        eos_token_id=eos,
        oracle=lambda tokens, m: answer[len(tokens) - len(PROMPT) :][:m],
    )
    assert trace.tokens == answer[: answer.index(eos) + 1]
    assert 1 < len(trace.tokens) < MAX_TOKENS


def test_the_adapter_acts_at_the_gate_only_and_as_peft_says(tiny, lora):
    """Gate open everywhere: peft's own logits. At one position: those before it are the base model's, bit for bit."""
    from peft import PeftModel

    model, path = tiny
    ids = torch.tensor([PROMPT * 3])
    with torch.inference_mode():
        base = model(input_ids=ids).logits
        with lora.at(torch.ones(12, dtype=torch.bool)):
            everywhere = model(input_ids=ids).logits
        with lora.at(torch.arange(12) == 7):
            one = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, base)
        lora.remove()
        wrapped = PeftModel.from_pretrained(model, str(path))
        theirs = wrapped(input_ids=ids).logits
        wrapped.unload()
    torch.testing.assert_close(everywhere, theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(one[:, :7], base[:, :7])
    assert (one[:, 7] - base[:, 7]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("change", "names"),
    [({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias='all'"), ({"modules_to_save": ["lm_head"]}, "lm_head")],
    ids=["dora", "bias", "saved"],
)
def test_refuses_an_adapter_that_is_more_than_lora(tiny, tmp_path, change, names):
    model, path = tiny
    config = json.loads((path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    (tmp_path / "adapter_model.safetensors").symlink_to(path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=names):
        GatedLoRA(model, tmp_path)


@pytest.mark.parametrize(
    ("change", "names"),
    [({"n": 0}, "n=0"), ({"max_tokens": 0}, "max_tokens=0"), ({"draft_sampling": "best"}, "draft_sampling='best'")],
    ids=["n", "max_tokens", "draft_sampling"],
)
def test_refuses_wrong_settings(tiny, change, names):
    with pytest.raises(ValueError, match=names):
        decode(tiny[0], PROMPT, **({"n": 2, "mask_token_id": MASK, "max_tokens": 4} | change))


# Sampled decoding: a vocabulary small enough to enumerate every answer of LENGTH tokens. At n = 3 those are the token
# of the prompt's forward, a cold forward's and what a verify forward emits (up to three, or fewer and a cold one's).
VOCAB, LENGTH, SAMPLES = 6, 5, 10_000


class Remembered:
    """A model that runs each distinct forward once."""

    def __init__(self, model, lora: GatedLoRA) -> None:
        self.model, self.lora, self.device, self.known = model, lora, "cpu", {}

    def __call__(self, input_ids: torch.Tensor) -> SimpleNamespace:
        gate = self.lora.gate
        key = (*input_ids[0].tolist(), None, *(gate.tolist() if gate is not None else ()))
        if key not in self.known:
            self.known[key] = self.model(input_ids=input_ids)
        return self.known[key]


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """(remembered model, lora, its exact distribution by temperature)."""
    folder = tmp_path_factory.mktemp("sampled")
    path = write_tiny(folder / "model", vocab=VOCAB, seed=4)
    model = load_tiny(path)
    lora = GatedLoRA(model, write_adapter(folder / "adapter", path, scale=0.5))
    answers = torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH)))
    prompts = torch.tensor(PROMPT).expand(len(answers), -1)
    with torch.inference_mode():
        logits = model(input_ids=torch.cat([prompts, answers], 1)[:, :-1]).logits[:, len(PROMPT) - 1 :].double()

    def exact(temperature: float) -> torch.Tensor:
        """[V, V, V, V, V] probabilities of the answers."""
        steps = (logits / temperature).log_softmax(-1).gather(2, answers.unsqueeze(2)).squeeze(2)
        return steps.sum(1).exp().view([VOCAB] * LENGTH)

    return Remembered(model, lora), lora, exact


def _answers(
    sampled, temperature: float, seed: int, samples: int = SAMPLES, **options
) -> tuple[torch.Tensor, list[Trace]]:
    """Counts [V] * LENGTH of the sampled answers, and their traces."""
    model, lora, _ = sampled
    generator = torch.Generator().manual_seed(seed)
    options = {"n": 3, "mask_token_id": MASK, "max_tokens": LENGTH, "lora": lora} | options
    traces = [decode(model, PROMPT, temperature=temperature, generator=generator, **options) for _ in range(samples)]
    counts = torch.zeros([VOCAB] * LENGTH)
    counts.index_put_(tuple(torch.tensor([t.tokens for t in traces]).T), torch.ones(()), accumulate=True)
    return counts, traces


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("temperature", "draft_sampling"),
    [(1.0, "probabilistic"), (0.7, "probabilistic"), (1.0, "greedy")],
)
def test_sampled_answers_follow_the_models_own_distribution(sampled, temperature, draft_sampling):
    counts, traces = _answers(sampled, temperature, seed=1, draft_sampling=draft_sampling)
    exact = sampled[2](temperature)
    # The first three tokens, and the last three that drafts were verified for: two tests at 0.01 together.
    assert chi_square(counts.sum((3, 4)), exact.sum((3, 4))).pvalue > ALPHA / 2
    assert chi_square(counts.sum((0, 1)), exact.sum((0, 1))).pvalue > ALPHA / 2
    accepted = [forward.accepted for trace in traces for forward in trace.forwards if forward.kind == "verify"]
    assert set(accepted) == {0, 1, 2}
    for trace in traces[:200]:
        _check_chain(trace, 3)


@pytest.mark.heavy
def test_the_adapter_moves_the_drafts_but_not_the_answers(sampled):
    """Two-sample test at 0.01 of the answers with the adapter against those without."""
    with_adapter, traces = _answers(sampled, 1.0, seed=2, samples=4000)
    without, plain = _answers(sampled, 1.0, seed=3, samples=4000, lora=None)
    assert chi_square_two(with_adapter.sum((0, 1)), without.sum((0, 1))).pvalue > ALPHA
    drafts = [torch.zeros(VOCAB) for _ in range(2)]
    for count, group in zip(drafts, (traces, plain), strict=True):
        for trace in group:
            count[trace.proposals[0]] += 1
    assert drafts[0][MASK] == drafts[1][MASK] == 0
    assert chi_square_two(*drafts).pvalue < 1e-6
