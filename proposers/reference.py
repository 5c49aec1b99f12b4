"""Introspective strided decoding over a transformers model: slow, without a KV cache, meant to be obviously right.

Every forward runs over the whole sequence `[prefix, x, d1..dk, M1..Mm]` with full causal attention, one request at a
time, and records what it did. It is the oracle of the vLLM path, forward by forward, so it shares none of the kernels:
verification here is the textbook rule (arXiv 2211.17192, arXiv 2604.11035), token by token, in float64.

The prompt's own forward is such a row too, its last token in the place of x and without drafts: it yields the first
token, and drafts for the first decode forward.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from vllm_idlm.proposers.state import plan_groups, plan_slots

Oracle = Callable[[list[int], int], Sequence[int]]


@dataclass(frozen=True)
class Forward:
    """One forward of the request after the prompt's."""

    kind: str  # "cold" (no drafts) or "verify"
    drafts: tuple[int, ...]  # verified in this forward
    masks: int  # mask slots it carried
    accepted: int  # drafts accepted, from the left
    emitted: tuple[int, ...]  # the accepted drafts and one more token
    proposals: tuple[int, ...]  # drafts for the next forward; empty if no masks stood behind what was accepted
    extra: tuple[tuple[int, int], ...] = ()  # extra groups of masks it carried: (j accepted, masks)


@dataclass
class Trace:
    """What a request emitted, and how."""

    tokens: list[int]  # all emitted tokens, the prompt forward's x first; cut after the end-of-sequence token
    forwards: list[Forward] = field(default_factory=list)
    proposals: tuple[int, ...] = ()  # drafts that the prompt's forward handed to the first of `forwards`

    @property
    def tpf(self) -> float:
        """Tokens per forward: tokens emitted by the forwards after the prompt's, over the number of those."""
        return (len(self.tokens) - 1) / len(self.forwards)


@torch.inference_mode()
def decode(
    model: nn.Module,
    prompt_ids: Sequence[int],
    *,
    n: int,
    mask_token_id: int,
    max_tokens: int,
    temperature: float = 0.0,
    lora: GatedLoRA | None = None,
    generator: torch.Generator | None = None,
    eos_token_id: int | None = None,
    draft_sampling: str = "probabilistic",
    oracle: Oracle | None = None,
    groups: Sequence[int] = (),
    prompt_masks: bool = True,
) -> Trace:
    """Decode one request with stride n (n = 1: plain decoding).

    model:          a causal language model of transformers: `model(input_ids=[1, T]).logits` is [1, T, V].
    prompt_ids:     at least one token id; a mask token in it is an ordinary token.
    max_tokens:     at least 1; the plan of drafts and masks near the end is `plan_slots`, as in the vLLM path.
    temperature:    0 is greedy.
    lora:           the gated adapter: switched on at the mask slots only.
    draft_sampling: "probabilistic" draws drafts from q at the same temperature; "greedy" takes q's argmax, as a one-hot
                    proposal.
    oracle:         `oracle(tokens, m)` gives at most m drafts to follow `tokens` (prompt and answer so far) in place of
                    the model's own; they are verified as one-hot proposals.
    groups:         extra groups of masks, by the number of drafts accepted: here a forward of its own over
                    `[prefix, x, d1..dj, M..]`, which is what such a group is to compute.
    prompt_masks:   whether the forward over the prompt carries masks, so that the next one has drafts to verify.
    """
    if draft_sampling not in ("probabilistic", "greedy"):
        raise ValueError(f"draft_sampling={draft_sampling!r}: must be 'probabilistic' or 'greedy'.")
    if n < 1 or max_tokens < 1 or not prompt_ids:
        raise ValueError(f"n={n}, max_tokens={max_tokens}, {len(prompt_ids)} prompt tokens: each must be at least 1.")
    sampler = _Sampler(temperature, generator, mask_token_id, draft_sampling)
    sequence = list(prompt_ids)
    m = plan_slots(0, n - 1, max_tokens)[1] if prompt_masks else 0
    logits = _logits(model, [*sequence, *[mask_token_id] * m], m, lora)[len(sequence) - 1 :]
    trace = Trace(sampler.verify(logits[:1], []))
    proposals = sampler.propose(logits[1:])  # (draft, its q [V]) of each
    if oracle is not None:
        proposals = [(d, sampler.one_hot(d, logits)) for d in oracle([*sequence, *trace.tokens], m)]
    trace.proposals = tuple(d for d, _ in proposals)
    while len(trace.tokens) < max_tokens and trace.tokens[-1] != eos_token_id:
        sequence = [*prompt_ids, *trace.tokens]
        k, m = plan_slots(len(proposals), n - 1, max_tokens - len(trace.tokens))
        drafts = proposals[:k]
        tokens = [*sequence, *(d for d, _ in drafts)]
        logits = _logits(model, [*tokens, *[mask_token_id] * m], m, lora)[len(sequence) - 1 :]
        emitted = sampler.verify(logits[: k + 1], drafts)
        accepted = len(emitted) - 1
        extra = plan_groups(k, n - 1, max_tokens - len(trace.tokens), groups)
        proposals = sampler.propose(logits[k + 1 :]) if accepted == k else []
        if masks := dict(extra).get(accepted, 0):
            group = [*tokens[: len(sequence) + accepted], *[mask_token_id] * masks]
            proposals = sampler.propose(_logits(model, group, masks, lora)[-masks:])
        if oracle is not None and accepted == k:
            proposals = [(d, sampler.one_hot(d, logits)) for d in oracle([*sequence, *emitted], m)]
        kind = "verify" if k else "cold"
        own = (tuple(d for d, _ in drafts), m, accepted, tuple(emitted), tuple(d for d, _ in proposals))
        trace.forwards.append(Forward(kind, *own, extra))
        trace.tokens += _until(emitted, eos_token_id)
    return trace


def _logits(model: nn.Module, tokens: list[int], masks: int, lora: GatedLoRA | None) -> Tensor:
    """[T, V] float64 logits of one forward over `tokens`, the last `masks` of which are mask slots."""
    device = getattr(model, "device", "cpu")
    ids = torch.tensor([tokens], device=device)
    gate = torch.arange(len(tokens), device=device) >= len(tokens) - masks
    if lora is None:
        return model(input_ids=ids).logits[0].double()
    with lora.at(gate):
        return model(input_ids=ids).logits[0].double()


def _until(tokens: list[int], eos_token_id: int | None) -> list[int]:
    return tokens[: tokens.index(eos_token_id) + 1] if eos_token_id in tokens else tokens


@dataclass
class _Sampler:
    """The textbook rule over one request. Distributions are [V] float64; a greedy target is one-hot at its argmax."""

    temperature: float
    generator: torch.Generator | None
    mask_token_id: int
    draft_sampling: str

    def one_hot(self, token: int, like: Tensor) -> Tensor:
        return torch.zeros_like(like[0]).index_fill_(0, torch.tensor(token, device=like.device), 1.0)

    def target(self, logits: Tensor) -> Tensor:
        """p from logits [V]."""
        if self.temperature == 0:
            return self.one_hot(int(logits.argmax()), logits.unsqueeze(0))
        return (logits / self.temperature).softmax(-1)

    def draw(self, distribution: Tensor) -> int:
        return int(torch.multinomial(distribution, 1, generator=self.generator))

    def propose(self, logits: Tensor) -> list[tuple[int, Tensor]]:
        """A draft and its q for each of the mask slots' logits [m, V]; the mask token is banned from q."""
        proposals = []
        for row in logits:
            row = row.clone()
            row[self.mask_token_id] = float("-inf")
            q = self.target(row)
            if self.draft_sampling == "greedy":
                q = self.one_hot(int(row.argmax()), logits)
            proposals.append((self.draw(q), q))
        return proposals

    def verify(self, logits: Tensor, drafts: list[tuple[int, Tensor]]) -> list[int]:
        """The emitted tokens: accepted drafts and one more. logits [k + 1, V], of the anchors and the certain row."""
        emitted = []
        for row, (draft, q) in zip(logits, drafts, strict=False):
            p = self.target(row)
            u = torch.rand((), dtype=torch.float64, generator=self.generator, device=row.device)
            if u < p[draft] / q[draft]:
                emitted.append(draft)
            else:
                return [*emitted, self.draw((p - q).clamp(min=0))]
        return [*emitted, self.draw(self.target(logits[-1]))]


class GatedLoRA:
    """A peft adapter on a transformers model that acts at chosen positions only.

    Hooks every linear module the adapter names: `y = W x + g * (alpha / r) * B A x`, with the gate g of the position.
    Outside of `at` the model is the base model. `remove` takes the hooks off.
    """

    def __init__(self, model: nn.Module, path: str | Path) -> None:
        """path: a folder with adapter_config.json and adapter_model.safetensors, as peft writes them.

        Raises ValueError if the adapter holds anything but low-rank updates of linear modules of `model`.
        """
        from safetensors.torch import load_file

        config = json.loads((Path(path) / "adapter_config.json").read_text())
        _refuse_beyond_lora(config, path)
        weights = load_file(str(Path(path) / "adapter_model.safetensors"))
        root = config["r"] ** 0.5 if config.get("use_rslora") else config["r"]
        self._scale = config["lora_alpha"] / root
        self._gate: Tensor | None = None
        self._hooks = []
        modules = dict(model.named_modules())
        for key in sorted(k for k in weights if k.endswith(".lora_A.weight")):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            if not isinstance(modules.get(name), nn.Linear):
                raise ValueError(f"adapter {path}: {name!r} is not a linear module of {type(model).__name__}.")
            pair = weights.pop(key), weights.pop(key.replace("lora_A", "lora_B"))
            self._hooks.append(modules[name].register_forward_hook(self._hook(*pair, modules[name].weight)))
        if weights:
            raise ValueError(f"adapter {path}: unknown weights {sorted(weights)[:3]}; only lora_A/lora_B is read.")

    def _hook(self, a: Tensor, b: Tensor, like: Tensor) -> Callable:
        a, b = a.to(like), b.to(like)  # [r, in], [out, r]

        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if self._gate is None or not self._gate.any():
                return output
            update = inputs[0] @ a.T @ b.T * self._scale
            return torch.where(self._gate.unsqueeze(-1), output + update, output)

        return add

    @property
    def gate(self) -> Tensor | None:
        """[T] bool, the positions the adapter acts at now; None: nowhere."""
        return self._gate

    @contextmanager
    def at(self, gate: Tensor) -> Iterator[None]:
        """Within it the adapter acts at the positions where gate [T] bool is set, of every sequence of the batch."""
        self._gate = gate
        try:
            yield
        finally:
            self._gate = None

    def remove(self) -> None:
        """Take the adapter off the model."""
        for hook in self._hooks:
            hook.remove()


def _refuse_beyond_lora(config: dict, path: str | Path) -> None:
    for setting in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern"):
        if config.get(setting):
            raise ValueError(f"adapter {path}: {setting}={config[setting]!r} is not read here; train it without.")
    if config.get("bias", "none") != "none":
        raise ValueError(f"adapter {path}: bias={config['bias']!r} is not read here; must be 'none'.")
