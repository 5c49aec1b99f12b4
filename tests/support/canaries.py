"""`idlm doctor --engine`'s comparison on engines of a tiny model, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support import tiny
from tests.support.engines import engine, isd
from vllm_idlm.cli import _canary, canary
from vllm_idlm.cli._canary import Case, Found

BATCHES = [[[3, 7, 11, 2], [5, 5, 9] * 15, [13]], [[40, 2, 40, 2, 40]]]
OPTIONS = {"skip_tokenizer_init": True, "max_model_len": 128, "max_num_seqs": 3, "max_num_batched_tokens": 256}
MASK = 1


def start(folder: Path, **options: Any) -> tuple[Found, Any]:
    """Plain decoding's Found, and an ISD engine with a draft adapter. options: of the second."""
    model = str(tiny.write_tiny(folder / "model", vocab=48))
    plain = engine(model, **OPTIONS)
    answers = _canary.ask(plain, BATCHES, 33)
    found = Found(BATCHES, [spelt(Case("plain", answers, 0.0))], _canary.machine(plain.llm_engine.vllm_config))
    config = isd(mask_token_id=MASK, lora=str(tiny.write_adapter(folder / "draft", model, scale=0.5)), coverage="all")
    return found, engine(model, speculative_config=config, **OPTIONS, **options)


def spelt(case: Case) -> Case:
    """The case with its tokens' ids for their texts."""
    case.pieces = [[str(t) for t in ids] for ids in case.answers]
    return case


def verdict(started: tuple[Found, Any], *names: str) -> tuple[Any, Found]:
    """What the canary says of cases of these names, and what it ran."""
    plain, llm = started
    reference = plain.cases[0].answers
    cases = [spelt(_canary.compare(llm, name, plain.prompts, reference, MASK)) for name in names]
    found = Found(plain.prompts, cases, _canary.machine(llm.llm_engine.vllm_config))
    return canary.judge(plain, found), found
