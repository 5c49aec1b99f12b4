"""`idlm eval` on real servers: the same answers, honest differences, and going on after an interruption."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install '.[eval]')")
pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed (pip install '.[eval]')")

from vllm_idlm.cli import app
from vllm_idlm.evaluate import server

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
MODEL = "smollm2-135m-risd"
FLAGS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "8"]
FLAGS += ["--kv-cache-memory-bytes", "200000000"]


def evaluate(out, *arguments):
    """A run of the command, and its result.json."""
    done = CliRunner().invoke(app, ["eval", "reasoning-gym", *arguments, "--out", str(out)], terminal_width=200)
    assert done.exit_code == 0, done.output
    return done.output, json.loads((out / "result.json").read_text())


@pytest.fixture(scope="module")
def running(smol, tmp_path_factory):
    """An R-ISD server that stands for both sides, and what a first evaluation of it said."""
    with server.serve(MODEL, server.method("risd"), FLAGS) as url:
        out = tmp_path_factory.mktemp("eval")
        arguments = ["--url", f"a={url}", "--url", f"b={url}", "--limit", "2", "--max-tokens", "24"]
        arguments += ["--temperature", "0,1", "--samples", "2", "--concurrency", "8", "--floor", "2"]
        output, result = evaluate(out, *arguments)
        yield out, arguments, output, result


def test_every_case_is_there(running):
    _, _, output, result = running
    found = [(c["method"], c["temperature"], c["answers"]) for c in result["cases"]]
    assert found == [("a", 0.0, 12), ("b", 0.0, 12), ("floor", 0.0, 12), ("a", 1.0, 24), ("b", 1.0, 24)]
    assert result["provenance"]["versions"]
    assert "Greedy: 12 of 12 answers identical" in output
    assert "Sampled: 1 comparisons" in output


def test_greedy_in_float32_is_the_same_at_any_concurrency(running):
    greedy = [c for c in running[3]["cases"] if c["temperature"] == 0 and c["method"] != "a"]
    assert [c["identical"] for c in greedy] == [12, 12]


def test_forwards_are_the_servers_own(running):
    counted = running[3]["counters"]["a"]
    assert counted["tpf"] == counted["tokens"] / counted["forwards"] > 1.05


def test_it_goes_on_and_shows_a_difference_with_its_gap(running):
    """One answer is taken away and one is changed behind its first token: the one is asked again, the other weighed."""
    out, arguments, _, first = running
    file = out / "answers" / "b.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    own = [e for e in lines if "answer" in e and len(e["answer"]["token_ids"]) > 3]
    gone, changed = own[0], own[1]
    answer = changed["answer"]
    answer["token_ids"][1] = 260 if answer["token_ids"][1] != 260 else 261
    answer["text"] = answer["text"][:1] + "~" + answer["text"][2:]
    file.write_text("".join(json.dumps(e) + "\n" for e in lines if e is not gone))
    before = file.read_text()

    output, again = evaluate(out, *arguments)

    added = [json.loads(line) for line in file.read_text().removeprefix(before).splitlines()]
    assert [e["answer"] for e in added if "answer" in e] == [gone["answer"]]
    (case,) = [c for c in again["cases"] if c["method"] == "b" and c["temperature"] == 0]
    (difference,) = case["differences"]
    assert case["identical"] == 11
    assert difference["token"] == 1
    assert difference["gap"] is None or difference["gap"] > 0  # greedy took the likelier one
    assert "1 greedy answers part from the reference" in output
    assert [c["right"] for c in first["cases"] if c["method"] == "a"] == [
        c["right"] for c in again["cases"] if c["method"] == "a"
    ]


def test_too_many_tokens_are_refused_before_anything_is_asked(running, tmp_path):
    _, arguments, *_ = running
    urls = arguments[:4]
    done = CliRunner().invoke(
        app, ["eval", "reasoning-gym", *urls, "--max-tokens", "600", "--out", str(tmp_path)], terminal_width=200
    )
    assert done.exit_code == 2
    assert "leaves no room for the prompt in 512 tokens" in " ".join(done.output.split())


@pytest.mark.slow
def test_servers_of_its_own(smol, tmp_path):
    """Plain, ISD and R-ISD, each served by the command itself: the same greedy answers in float32."""
    arguments = ["--model", MODEL, "--methods", "plain,isd,risd", "--limit", "2", "--max-tokens", "24"]
    _, result = evaluate(tmp_path, *arguments, "--temperature", "0", "--serve", " ".join(FLAGS))
    compared = {c["method"]: c["identical"] for c in result["cases"] if c["method"] != "plain"}
    assert compared == {"isd": 12, "risd": 12, "floor": 12}
    assert result["counters"]["risd"]["tpf"] > result["counters"]["isd"]["tpf"] >= 1.0


def test_a_server_that_cannot_start_says_why(tmp_path):
    done = CliRunner().invoke(
        app, ["eval", "reasoning-gym", "--model", str(tmp_path), "--limit", "1", "--out", str(tmp_path / "out")]
    )
    assert done.exit_code == 2
    assert "the server of 'risd' did not start" in " ".join(done.output.split())
