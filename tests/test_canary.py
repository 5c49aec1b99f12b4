"""`idlm doctor --engine`: a sound engine passes, planted faults are found, and what is said is plain."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from tests.engines import engine, isd, proposer
from vllm_idlm.cli import _canary, app, canary, checks, child
from vllm_idlm.cli._canary import AS_THEY_ARE, RIGHT, WRONG, Case, Found
from vllm_idlm.forced import Forced
from vllm_idlm.settings import SettingsError

RUNNER = CliRunner()
SETTINGS = {"n": 4, "coverage": "all", "schedule": None, "mask_token_id": 16}
MACHINE = {"vllm": "0.32.0", "runner": "V1", "device": "CPU", "dtype": "float32", "mode": "eager", "settings": SETTINGS}


# -- wording, without an engine


def case(name, answers, forwards=(), drafted=3, accepted=0, margins=None):
    stats = {"drafted_per_position": [drafted], "accepted_per_position": [accepted], "tpf": 1.0}
    pieces = [[f"<{t}>" for t in ids] for ids in answers]
    return Case(name, answers, 1.0, stats, list(forwards), margins or [None] * len(answers), pieces)


def judged(one, dtype="float32", answers=((1, 2, 3, 4, 5), (6, 7, 8, 9, 10))):
    plain = case("plain", [list(ids) for ids in answers])
    prompts = [[[0], [0]]]
    return canary.judge(Found(prompts, [plain], MACHINE), Found(prompts, [one], {**MACHINE, "dtype": dtype}))


GOOD = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
ALL = [[[3, 3, 4]], [[3, 3, 4]]]  # drafts, accepted, emitted: four tokens behind the first


def test_equal_answers_are_said_in_one_sentence():
    found = judged(case(RIGHT, GOOD, ALL, 6, 6))
    assert found.good
    assert found.sentence == (
        "This machine decodes with ISD exactly as without: 10 of 10 tokens equal in each of 1 runs "
        "(vLLM 0.32.0, Model Runner V1, CPU, float32, eager)."
    )


def test_a_parting_is_named():
    found = judged(case(WRONG, [GOOD[0], [6, 7, 9, 9, 9]]))
    assert not found.good
    assert "with drafts forced wrong, prompt 2 parts from plain decoding at token 3 ('<9>' instead of '<8>')" in (
        found.sentence
    )
    assert found.sentence.startswith("NOT exact")
    assert found.sentence.endswith("Do not serve with ISD on this machine; please report it with this output.")


@pytest.mark.parametrize(("dtype", "good"), [("bfloat16", True), ("float32", False)])
def test_a_tie_is_one_in_half_precision_only(dtype, good):
    found = judged(case(AS_THEY_ARE, [GOOD[0], [6, 7, 9, 9, 9]], margins=[None, [-0.6, -0.8]]), dtype)
    assert found.good is good
    assert ("1 of 2 answers part" if good else "(log-probabilities -0.80 and -0.60)") in found.sentence


def test_a_wide_margin_is_no_tie():
    assert not judged(case(AS_THEY_ARE, [GOOD[0], [6, 7, 9, 9, 9]], margins=[None, [-0.2, -2]]), "bfloat16").good


@pytest.mark.parametrize(
    ("name", "forwards", "words"),
    [
        (RIGHT, [[[3, 3, 4]], [[3, 1, 2], [1, 1, 2]]], "the right draft of prompt 2, token 3 was rejected"),
        (RIGHT, [[[3, 3, 4]], [[0, 0, 1], [2, 2, 3]]], "0 drafts instead of 3 were verified at prompt 2, token 2"),
        (WRONG, [[[3, 0, 1]] * 4, [[3, 1, 2]] * 2], "1 wrong drafts in front of prompt 2, token 3 were accepted"),
    ],
)
def test_a_forced_draft_that_is_misjudged_is_named(name, forwards, words):
    found = judged(case(name, GOOD, forwards))
    assert not found.good
    assert f"NOT in order: with drafts {name}, {words}." in found.sentence


def test_behind_a_tie_forced_drafts_are_not_judged():
    forwards = [[[3, 3, 4]], [[3, 1, 2], [3, 0, 1], [3, 0, 1]]]
    answers = [GOOD[0], [6, 7, 9, 9, 9]]
    assert judged(case(RIGHT, answers, forwards, margins=[None, [-0.6, -0.8]]), "bfloat16").good


def test_without_drafts_nothing_was_tested():
    assert "no draft was verified at all" in judged(case(AS_THEY_ARE, GOOD, drafted=0)).sentence


# -- scripts


def test_wrong_drafts_are_wrong_everywhere_and_never_the_mask():
    for answer in ([5, 6, 7], [5, 5, 5], [16, 16, 5], [0, 0, 0], [1, 2, 0]):
        for mask in (16, 0, 1):
            other = _canary.wrong(answer, mask)
            assert all(a != b != mask for a, b in zip(answer, other, strict=True))


def test_scripts_by_name_and_place():
    forced = Forced({"canary-0": [1, 2, 3, 4], "canary-1": [5, 6]})
    assert forced.ahead("canary-0-abcdef12", 2, [9, 9, 9]) == [3, 4, 9]
    assert forced.ahead("canary-1", 1, [9]) == [6]
    assert forced.ahead("other-1", 0, [9]) == [9]
    requests = ["canary-1-0", "else", "canary-0-abcdef12"]
    got = forced.over(requests, torch.tensor([1, 0, 2]), torch.full((3, 3), 9))
    assert got.tolist() == [[6, 9, 9], [9, 9, 9], [3, 4, 9]]


def test_a_long_prompt_ends_in_front_of_a_block():
    assert _canary.fitted([1] * 50, 16) == [1] * 50
    for length in (250, 400):
        assert (len(_canary.fitted(list(range(length)), 128)) + 16) % 128 == 0


# -- the command line


@pytest.mark.parametrize("given", [["smollm2-135m-risd"], ["--n", "4"], ["--json", "x"], ["--eager"]])
def test_options_of_the_engine_want_the_engine(given):
    shown = RUNNER.invoke(app, ["doctor", *given])
    assert shown.exit_code == 2
    assert "only with --engine" in " ".join(shown.output.split())


def test_options_make_the_engine():
    text = '{"tensor_parallel_size": 2, "speculative_config": {"coverage": "last"}}'
    made = canary.asked(canary.Options("smollm2-135m-risd", n=3, dtype="float32", engine_args=text))
    assert made.engine == {"model": "smollm2-135m-risd", "tensor_parallel_size": 2, "dtype": "float32"}
    assert made.speculation == {"method": "isd", "coverage": "last", "n": 3}
    assert made.embedded
    assert (made.tokens - 1) % 3 == 0
    assert canary.asked(canary.Options("smollm2-135m-risd")).tokens == 33


@pytest.mark.parametrize("text", ["{", "[1]", '{"speculative_config": 4}'])
def test_engine_args_that_are_no_object_are_refused(monkeypatch, text):
    monkeypatch.setattr(checks, "CHECKS", ())
    shown = RUNNER.invoke(app, ["doctor", "--engine", "--engine-args", text])
    assert shown.exit_code == 1
    assert "--engine-args" in shown.output


def test_no_engine_is_started_where_something_is_broken(monkeypatch):
    monkeypatch.setattr(checks, "CHECKS", (lambda: iter([checks.Finding("x", "broken", "it is bad", "mend it")]),))
    monkeypatch.setattr(child, "work", lambda *_: pytest.fail("an engine was started"))
    shown = RUNNER.invoke(app, ["doctor", "--engine"])
    assert shown.exit_code == 1
    assert "No engine was started" in shown.output


def test_attention_without_extra_groups_is_asked_again(monkeypatch):
    seen = []

    def work(module, what, *_):
        seen.append(what.speculation["coverage"])
        if len(seen) == 2:
            raise child.RunError('SettingsError: "coverage": extra groups of mask slots do not run with x')
        return {"prompts": [], "cases": [vars(case("plain", GOOD))], "machine": MACHINE}

    monkeypatch.setattr(child, "work", work)
    canary._both(canary.asked(canary.Options("smollm2-135m-risd")), False)
    assert seen == ["all", "all", "last"]


@pytest.mark.vllm
def test_a_model_without_a_mask_token_is_refused_before_it_is_loaded(smol):
    said = []
    with pytest.raises(SettingsError, match='"mask_token_id" is not known'):
        _canary.execute(canary.asked(canary.Options(smol)), said.append)
    assert said == [{"phase": "loading vLLM, checking what is asked for"}]


@pytest.mark.slow
@pytest.mark.vllm
def test_the_whole_command(monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "CHECKS", ())
    shown = RUNNER.invoke(app, ["doctor", "--engine", "--json", str(tmp_path / "found.json")])
    assert shown.exit_code == 0, shown.output
    assert "132 of 132 tokens equal in each of 3 runs" in " ".join(shown.output.split())
    record = json.loads((tmp_path / "found.json").read_text())
    assert record["good"]
    assert [found["name"] for found in record["isd"]["cases"]] == [AS_THEY_ARE, RIGHT, WRONG]


# -- engines


@pytest.fixture(scope="module")
def started(smol, adapter):
    """Plain decoding's Found, and an ISD engine with the draft adapter."""
    plain = engine(smol)
    tokenizer = plain.get_tokenizer()
    batches = [[_canary.fitted(tokenizer.encode(p), 128) for p in batch] for batch in canary.PROMPTS]
    answers = _canary.ask(plain, batches, 33)
    made = Case("plain", answers, 0.0, pieces=[[str(t) for t in ids] for ids in answers])
    found = Found(batches, [made], _canary.machine(plain.llm_engine.vllm_config))
    return found, engine(smol, speculative_config=isd(mask_token_id=16, lora=adapter, coverage="all"))


def verdict(started, *names):
    plain, llm = started
    found = Found(plain.prompts, [], _canary.machine(llm.llm_engine.vllm_config))
    for name in names:
        made = _canary.compare(llm, name, plain.prompts, plain.cases[0].answers, 16)
        made.pieces = [[str(t) for t in ids] for ids in made.answers]
        found.cases.append(made)
    return canary.judge(plain, found), found


@pytest.fixture(scope="module")
def alone(started):
    """The same with the last prompt alone."""
    plain, llm = started
    last = plain.cases[0]
    made = Case("plain", last.answers[-1:], 0.0, pieces=last.pieces[-1:])
    return Found(plain.prompts[-1:], [made], plain.machine), llm


@pytest.mark.vllm
def test_a_sound_engine_passes(started):
    found, ran = verdict(started, AS_THEY_ARE, RIGHT, WRONG)
    assert found.good, found.sentence
    assert "132 of 132 tokens equal in each of 3 runs" in found.sentence
    as_is, right, wrong = ran.cases
    assert canary.figures(right) == (4, 96, 96)
    tpf, drafted, accepted = canary.figures(wrong)
    assert (tpf, drafted > 300, accepted) == (1, True, 0)
    assert canary.figures(as_is).tpf > 1
    assert proposer(started[1]).forced is None


@pytest.mark.vllm
def test_rejected_drafts_that_are_kept_are_found(alone, monkeypatch):
    from vllm_idlm.v1 import sampler

    def accept_all(logits, drafts, num_drafts, **options):
        verdict = original(logits, drafts, num_drafts, **options)
        ids = drafts.tolist()
        for i, count in enumerate(num_drafts.tolist()):
            for j in range(count):
                verdict.tokens[i, j] = ids.pop(0)
            verdict.tokens[i, count] = verdict.tokens[i, count].clamp(min=5)
        return verdict

    original = sampler.verify
    monkeypatch.setattr(sampler, "verify", accept_all)
    found, _ = verdict(alone, WRONG)
    assert found.sentence.startswith("NOT exact: with drafts forced wrong, prompt 1 parts from plain decoding at token")


@pytest.mark.vllm
def test_right_drafts_that_are_rejected_are_found(alone, monkeypatch):
    """The text is the same, in more forwards than it should take: the last draft is never verified."""
    from vllm_idlm.v1 import sampler

    def accept_fewer(logits, drafts, num_drafts, **options):
        verdict = original(logits, drafts, num_drafts, **options)
        for i, count in enumerate(num_drafts.tolist()):
            verdict.tokens[i, max(count, 1) :] = -1
        return verdict

    original = sampler.verify
    monkeypatch.setattr(sampler, "verify", accept_fewer)
    found, ran = verdict(alone, RIGHT)
    assert ran.cases[0].answers == alone[0].cases[0].answers
    assert found.sentence.startswith("NOT in order: with drafts forced right, the right draft of prompt 1, token 4 was")


@pytest.mark.vllm
def test_an_adapter_on_verified_rows_is_found(alone, monkeypatch):
    """The gate is a row too wide: the last row that is verified takes the draft adapter."""
    from vllm_idlm.v1 import proposer as module

    def too_wide(ids, counts, first, masks, value):
        return original(ids, counts, first - 1, masks + 1, value)

    original = module._mark
    monkeypatch.setattr(module, "_mark", too_wide)
    found, _ = verdict(alone, AS_THEY_ARE, RIGHT)
    assert found.sentence.startswith("NOT exact: with drafts")
