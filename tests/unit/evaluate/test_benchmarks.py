"""The benchmarks of `idlm eval`: the paper's with its settings, and wrong ones refused."""

from __future__ import annotations

import json

import pytest

from vllm_idlm.evaluate import benchmarks
from vllm_idlm.evaluate.benchmarks import EvalError

PAPER = {"arc-challenge", "mmlu", "mmlu-pro", "gpqa-diamond", "gpqa", "gsm8k", "math-500", "mathbench", "aime-24"}
PAPER |= {"aime-25", "humaneval", "mbpp", "livecodebench-v6", "ifeval"}


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
