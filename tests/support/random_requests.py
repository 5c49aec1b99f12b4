"""Requests with random legal combinations of every sampling option, and what ISD makes of them against plain decoding.

The model is tiny and random. Its own drafts are hardly ever right, so drafts are told: plain decoding's answer, one
token in three replaced. What decides is whether an engine with ISD answers as the same engine without.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from tests.support import tiny
from tests.support.engines import MASK, engine, isd, preemptions, stats

WORDS, BARE = 49_152, 48  # vocabularies: with SmolLM2's tokenizer, and without a tokenizer
LONGEST = 24  # tokens of an answer
TIE = 1e-4  # two tokens whose log-probabilities differ by less may change places with the size of a batch
BASE = {"max_model_len": 160, "max_num_seqs": 8, "block_size": 32, "logprobs_mode": "processed_logprobs"}
SMALL = {"num_gpu_blocks_override": 14}  # for some three requests of the longest kind
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # ISD's settings, vLLM's options
    "last, small cache": ({"n": 4, "coverage": "last"}, SMALL),
    "all, small cache": ({"n": 3, "coverage": "all"}, SMALL),
    "auto, cut prompts": ({"n": 4, "coverage": "auto"}, {"max_num_batched_tokens": 40, "max_num_seqs": 2}),
}


class Asked(NamedTuple):
    """A request: token ids of its prompt, and keyword arguments of SamplingParams (a grammar by its own word)."""

    prompt: list[int]
    options: dict[str, Any]

    @property
    def repeatable(self) -> bool:
        """Whether plain decoding gives the one right answer; else another run of the same seed does."""
        return self.options.get("temperature", 0) == 0 or self.options.get("top_k") == 1


@dataclass
class World:
    """A checkpoint, an adapter for it, and whether there is a tokenizer."""

    model: str
    adapter: str
    words: bool

    @classmethod
    def write(cls, folder: Path, tokenizer: str | None) -> World:
        """Write both below `folder`. tokenizer: the folder to take one from."""
        model = tiny.write_tiny(folder / "model", vocab=WORDS if tokenizer else BARE)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json") if tokenizer else ():
            if (file := Path(tokenizer or "") / name).exists():
                shutil.copy(file, model / name)
        return cls(str(model), str(tiny.write_adapter(folder / "draft", model, scale=0.5)), tokenizer is not None)

    def plain(self) -> Any:
        """An engine without ISD, its cache large enough."""
        return engine(self.model, **BASE, **self._rest())

    def with_isd(self, method: str, **options: Any) -> Any:
        """An engine with ISD, as METHODS says."""
        settings, more = METHODS[method]
        config = isd(**{**settings, "mask_token_id": MASK, "lora": self.adapter})
        made = engine(self.model, speculative_config=config, **{**BASE, **more, **self._rest(), **options})
        if not hasattr(made, "preempted"):
            made.preempted = preemptions(made)  # names of requests, from now on
        return made

    def _rest(self) -> dict[str, Any]:
        return {} if self.words else {"skip_tokenizer_init": True}


# -- what is asked


def prompts(vocabulary: int) -> st.SearchStrategy[list[int]]:
    """Prompts of 1 to 100 tokens that begin with a part of one of three texts."""
    rng = random.Random(3)
    texts = [[rng.randrange(2, vocabulary) for _ in range(96)] for _ in range(3)]
    begun = st.builds(lambda text, length: text[:length], st.sampled_from(texts), st.integers(0, 96))
    token = st.integers(2, vocabulary - 1)
    return st.builds(lambda begin, end: begin + end, begun, st.lists(token, min_size=1, max_size=4))


def options(world: World) -> st.SearchStrategy[dict[str, Any]]:
    """Legal options of one request."""
    token = st.integers(2, (WORDS if world.words else BARE) - 1)
    few = st.lists(token, min_size=1, max_size=3, unique=True)
    optional = {
        "top_p": st.sampled_from([0.5, 0.9, 0.99]),
        "min_p": st.sampled_from([0.05, 0.3]),
        "presence_penalty": st.sampled_from([-0.5, 0.8, 1.9]),
        "frequency_penalty": st.sampled_from([-0.3, 0.6, 1.5]),
        "repetition_penalty": st.sampled_from([0.8, 1.1, 1.6]),
        "logit_bias": st.dictionaries(token, st.sampled_from([-30.0, 2.5, 7.0]), min_size=1, max_size=3),
        "allowed_token_ids": st.sampled_from([list(range(2, 40)), list(range(5, 30, 2))]),
        "stop_token_ids": few,
        "min_tokens": st.integers(1, LONGEST),
        "ignore_eos": st.booleans(),
        "logprobs": st.integers(0, 4),
        "prompt_logprobs": st.integers(0, 2),
        "n": st.integers(1, 3),
        "extra_args": st.just({"isd": "off"}),
    }
    if world.words:
        optional |= {
            "stop": st.lists(st.sampled_from(["e", "th", " a", "ing", "\n"]), min_size=1, max_size=2),
            "include_stop_str_in_output": st.booleans(),
            "bad_words": st.lists(st.sampled_from(["the", " and", "ing", "a"]), min_size=1, max_size=2),
            "skip_special_tokens": st.booleans(),
            "json": st.just({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}),
            "choice": st.just(["definitely yes", "definitely no", "perhaps"]),
            "regex": st.just(r"[a-f]{3,9}(-[0-9]{2}){1,4}"),
        }
    always = {"max_tokens": st.integers(1, LONGEST), "way": st.sampled_from(["greedy", "greedy", "top-k 1", "seeded"])}
    kept = st.sets(st.sampled_from(sorted(optional)), max_size=6)
    return kept.flatmap(lambda names: st.fixed_dictionaries(always | {n: optional[n] for n in sorted(names)})).map(
        legal
    )


def legal(options: dict[str, Any]) -> dict[str, Any]:
    """The same without what vLLM refuses, or what leaves no token to choose."""
    made = dict(options)
    made |= {
        "greedy": {"temperature": 0.0},
        "top-k 1": {"temperature": 1.3, "top_k": 1},
        "seeded": {"temperature": 0.9, "seed": 11, "top_k": 20},
    }[made.pop("way")]
    grammars = [name for name in ("json", "choice", "regex") if name in made]
    dropped = set(grammars[1:])
    if grammars:
        dropped |= {"allowed_token_ids", "bad_words", "logit_bias", "min_tokens", "stop", "stop_token_ids"}
    if made["temperature"] == 0:
        dropped.add("n")
    if "min_tokens" in made:
        made["min_tokens"] = min(made["min_tokens"], made["max_tokens"])
    return {name: value for name, value in made.items() if name not in dropped}


def requests(world: World, most: int) -> st.SearchStrategy[list[Asked]]:
    """A batch of up to `most` requests."""
    one = st.builds(Asked, prompts(WORDS if world.words else BARE), options(world))
    return st.lists(one, min_size=1, max_size=most)


# -- what comes of it


def answers_as_plain_decoding(world: World, method: str, batches: int, most: int, **engine_options: Any) -> None:
    """Compare `batches` batches of up to `most` requests; raise AssertionError with the smallest that differs."""
    llm = world.with_isd(method, **engine_options)
    stats(llm)

    @settings(
        max_examples=batches, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(requests(world, most))
    def compare(asked: list[Asked]) -> None:
        note(script(world, method, asked))
        if said := differences(world, method, asked, **engine_options):
            raise AssertionError("\n".join(said))

    compare()
    found = stats(llm)
    assert found["rejected"] > 0
    assert sum(found["accepted_per_position"]) > batches, "hardly any draft was right: nothing was tested"
    assert llm.preempted or "small cache" not in method, "the cache was large enough: nothing was preempted"


def answers(llm: Any, asked: dict[int, Asked], scripts: dict[str, list[int]] | None = None) -> dict[int, Any]:
    """vLLM's outputs by the requests' numbers. scripts: what to draft, by name (`random-NUMBER`) and place."""
    if scripts is not None:
        llm.collective_rpc("isd_force", args=(scripts,))
    run, done = llm.llm_engine, {}
    for number, one in asked.items():
        run.add_request(f"random-{number}", {"prompt_token_ids": one.prompt}, _params(one.options))
    while run.has_unfinished_requests():
        done |= {output.request_id: output for output in run.step() if output.finished}
    if scripts is not None:
        llm.collective_rpc("isd_force", args=(None,))
    return {number: done[f"random-{number}"] for number in asked}


def _params(options: dict[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    given = {"ignore_eos": False, "output_kind": RequestOutputKind.FINAL_ONLY, **options}
    grammar = {name: given.pop(name) for name in ("json", "choice", "regex") if name in given}
    if grammar:
        given["structured_outputs"] = StructuredOutputsParams(**grammar)
    return SamplingParams(**given)


def told(asked: dict[int, Asked], right: dict[int, Any]) -> dict[str, list[int]]:
    """Drafts for the requests with one right answer: that answer, every third token replaced."""
    scripts = {}
    for number, one in asked.items():
        if one.repeatable and len(right[number].outputs) == 1:
            ids = right[number].outputs[0].token_ids
            scripts[f"random-{number}"] = one.prompt + [t if j % 3 else 2 + (t + 5) % 40 for j, t in enumerate(ids)]
    return scripts


def differences(world: World, method: str, requests: Sequence[Asked], **engine_options: Any) -> list[str]:
    """What ISD answers otherwise than it must, in words; [] if all is as it must be.

    Seeded requests that were preempted are left out: their text is another one of the same distribution.
    """
    plain, llm = world.plain(), world.with_isd(method, **engine_options)
    asked, before = dict(enumerate(requests)), len(llm.preempted)
    right = answers(plain, asked)
    found = answers(llm, asked, told(asked, right))
    seeded = {number: asked[number] for number in reversed(asked) if not asked[number].repeatable}
    right |= answers(llm, seeded)  # in other company
    said, lost = [], llm.preempted[before:]
    for number, one in asked.items():
        word = _difference(found[number], right[number])
        if not word or (number in seeded and any(f"random-{number}-" in name for name in lost)):
            continue
        if number in seeded or not _tie(plain, one, found[number], right[number]):
            said.append(f"request {number}: {word}")
    return said


def _difference(got: Any, want: Any) -> str:
    """What is not the same in two outputs of one request; "" if nothing."""
    for a, b in zip(got.outputs, want.outputs, strict=True):
        if list(a.token_ids) != list(b.token_ids):
            return f"tokens {list(a.token_ids)}, right are {list(b.token_ids)}"
        for name in ("text", "finish_reason", "stop_reason"):
            if getattr(a, name) != getattr(b, name):
                return f"{name} {getattr(a, name)!r}, right is {getattr(b, name)!r}"
        if not _same(a.logprobs, b.logprobs):
            return "other log-probabilities"
    return "" if _same(got.prompt_logprobs, want.prompt_logprobs) else "other log-probabilities of the prompt"


def _same(ours: Any, theirs: Any) -> bool:
    """Whether two rows of log-probabilities are alike, to 1e-3; which of two equal tokens comes first is left open."""
    if not ours or not theirs:
        return not ours and not theirs
    values = [[sorted(x.logprob for x in place.values()) for place in row if place] for row in (ours, theirs)]
    return len(values[0]) == len(values[1]) and all(
        len(a) == len(b) and all(abs(x - y) < 1e-3 or x == y for x, y in zip(a, b, strict=True))
        for a, b in zip(*values, strict=True)
    )


def _tie(plain: Any, one: Asked, got: Any, want: Any) -> bool:
    """Whether the first tokens that differ were equally probable, to rounding, when plain decoding chose."""
    ours, right = ([list(o.token_ids) for o in output.outputs] for output in (got, want))
    for i, (a, b) in enumerate(zip(ours, right, strict=True)):
        place = next((j for j, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if place is not None:
            greedy = one._replace(options={**one.options, "temperature": 0.0, "logprobs": 2, "n": 1})
            top = sorted(x.logprob for x in answers(plain, {0: greedy})[0].outputs[0].logprobs[place].values())[::-1]
            return i == 0 and len(top) > 1 and top[0] - top[1] < TIE
    return False


def script(world: World, method: str, asked: Sequence[Asked]) -> str:
    """A program of five lines that shows the differences again, to run from the project's folder."""
    return (
        f"from tests.support.random_requests import Asked, replay\n"
        f"method = {method!r}\n"
        f"words = {world.words}\n"
        f"asked = {list(asked)!r}\n"
        f"print(replay(method, words, asked))"
    )


def replay(method: str, words: bool, asked: Sequence[Asked], **engine_options: Any) -> list[str]:
    """What `differences` finds in a world made anew."""
    import tempfile

    from vllm_idlm import embedded

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = str(embedded.ensure(progress=False)) if words else None
        return differences(World.write(Path(folder), tokenizer), method, asked, **engine_options)
