"""`idlm doctor --engine` on real engines: a sound one passes, and planted faults are found."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tests.support.canaries import start, verdict
from tests.support.engines import proposer
from vllm_idlm.cli import _canary, app, canary, checks
from vllm_idlm.cli._canary import AS_THEY_ARE, RIGHT, WRONG, Case, Found
from vllm_idlm.settings import SettingsError

RUNNER = CliRunner()


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


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    return start(tmp_path_factory.mktemp("canary"))


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
    assert canary.figures(as_is).tpf >= 1
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
