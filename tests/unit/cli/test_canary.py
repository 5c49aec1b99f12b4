"""`idlm doctor --engine` without an engine: what is said of what was found, and the engines asked for."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from vllm_idlm.cli import app, canary, checks, child
from vllm_idlm.cli._canary import AS_THEY_ARE, RIGHT, WRONG, Case, Found

RUNNER = CliRunner()

SETTINGS = {"n": 4, "coverage": "all", "schedule": None, "mask_token_id": 16}
MACHINE = {"vllm": "0.32.0", "runner": "V1", "device": "CPU", "dtype": "float32", "mode": "eager", "settings": SETTINGS}


# -- wording


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


# -- the engines asked for


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
