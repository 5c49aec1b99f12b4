"""The tasks of `idlm eval` as lm-evaluation-harness runs them: what they ask, how answers are judged."""

from __future__ import annotations

import base64
import json
import pickle
import zlib

import pytest

from tests.support.needs import needs_harness, needs_sandbox
from vllm_idlm.evaluate import benchmarks, tasks
from vllm_idlm.evaluate.benchmarks import EvalError


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


@needs_harness
def test_names_of_the_harness_exist():
    named = [benchmarks.load(name) for name in benchmarks.names()]
    own = {task for b in named if b.kind == "lm_eval" for task in b.tasks}
    assert own
    assert own <= set(tasks.index().all_tasks)


def _local(tmp_path, name, rows):
    """A benchmark of the shipped ones on rows in a local folder; its only task."""
    loaded = benchmarks.load(name)
    text = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / f"{loaded.split}.jsonl").write_text(text)
    (task,) = tasks.build(loaded, str(tmp_path))
    return task, list(task.test_docs())


JUDGED = {
    "arc-challenge": (
        {"question": "Q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "2"},
        "The answer is (B).", "I first thought (B), but the answer is (A)",
    ),
    "mmlu": ({"question": "Q", "choices": ["x", "y"], "answer": 0}, "the answer is **(A)**", "Answer: B"),
    "mmlu-pro": ({"question": "Q", "options": list("abcdefghij"), "answer": "J"}, "The answer is (J).", "it is J"),
    "gsm8k": ({"question": "Q", "answer": "3+1=4\n#### 1,004"}, r"so \boxed{1004}", r"\boxed{104}"),
    "math-500": ({"problem": "Q", "answer": r"\frac{1}{2}"}, r"$\boxed{0.5}$", r"\boxed{2}"),
    "aime-24": ({"Problem": "Q", "Answer": 33}, r"Thus \boxed{033}", r"33 is wrong: \boxed{34}"),
    "mathbench": ({"question": "Q", "options": ["1", "2"], "answer": "B"}, "The answer is (B)", "The answer is (A)"),
}  # fmt: skip


@needs_harness
@pytest.mark.parametrize("name", JUDGED)
def test_answers_in_words_are_judged(tmp_path, name):
    row, right, wrong = JUDGED[name]
    task, (doc,) = _local(tmp_path, name, [row])
    assert task.process_results(doc, [right]) == {"correct": 1.0}
    assert task.process_results(doc, [wrong]) == {"correct": 0.0}
    assert task.doc_to_text(doc).startswith("Q")


@needs_harness
@pytest.mark.filterwarnings("ignore")
def test_a_task_of_the_harness_takes_a_local_folder(tmp_path):
    row = {
        "key": 1,
        "prompt": "Say nothing with a comma.",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}],
    }
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    (task,) = tasks.build(benchmarks.load("ifeval"), str(tmp_path))
    (doc,) = task.test_docs()
    assert task.process_results(doc, ["no"])["prompt_level_strict_acc"]
    assert not task.process_results(doc, ["a, b"])["prompt_level_strict_acc"]


@needs_harness
def test_a_missing_column_is_named(tmp_path):
    with pytest.raises(EvalError, match="no column 'choices'"):
        _local(tmp_path, "mmlu", [{"question": "Q", "answer": 0}])


@needs_harness
def test_a_task_that_scores_given_texts_is_refused(tmp_path):
    row = {"question": "Q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B", "id": "1"}
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row))
    loaded = benchmarks.load("ifeval", tasks={"arc_challenge": {}})
    with pytest.raises(EvalError, match=r"arc_challenge scores given texts \(multiple_choice\)"):
        tasks.build(loaded, str(tmp_path))


@needs_harness
def test_procedural_problems_are_the_same_each_time_and_judged_exactly():
    loaded = benchmarks.load("reasoning-gym", problems=4)
    first, second = tasks.build(loaded), tasks.build(loaded)
    assert len(first) == len(loaded.tasks)
    for a, b in zip(first, second, strict=True):
        assert [d["question"] for d in a.test_docs()] == [d["question"] for d in b.test_docs()]
        for doc in a.test_docs():
            assert a.process_results(doc, [f"I say {doc['answer']}"]) == {"correct": 1.0}
            assert a.process_results(doc, ["I do not know"]) == {"correct": 0.0}


@needs_harness
@needs_sandbox
def test_mbpp(tmp_path):
    row = {"text": "Add two numbers.", "test_list": ["assert add(1, 2) == 3"], "test_setup_code": ""}
    task, (doc,) = _local(tmp_path, "mbpp", [row])
    assert "assert add(1, 2) == 3" in task.doc_to_text(doc)
    assert task.process_results(doc, ["```python\ndef add(a, b):\n    return a + b\n```"])["correct"] == 1.0
    assert task.process_results(doc, ["```python\ndef add(a, b):\n    return a - b\n```"])["correct"] == 0.0


def _packed(tests) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


@needs_harness
@needs_sandbox
def test_livecodebench(tmp_path):
    """A program from input to output, and a method; public and private tests both count."""
    shown, hidden = [{"input": "3\n", "output": "6"}], [{"input": "5\n", "output": "10\n"}]
    double = {"question_content": "Double.", "starter_code": "", "metadata": "{}"}
    double |= {"public_test_cases": json.dumps(shown), "private_test_cases": _packed(hidden)}
    method = {"question_content": "Add.", "starter_code": "class Solution:", "metadata": '{"func_name": "add"}'}
    method |= {"public_test_cases": json.dumps([{"input": "[1]\n2", "output": "[1, 2]"}]), "private_test_cases": ""}
    task, (first, second) = _local(tmp_path, "livecodebench-v6", [double, method])
    assert task.process_results(first, ["```python\nprint(int(input()) * 2)\n```"])["correct"] == 1.0
    assert task.process_results(first, ["```python\ninput()\nprint(6)\n```"])["correct"] == 0.0
    good = "```python\nclass Solution:\n    def add(self, a, b):\n        return [*a, b]\n```"
    assert task.process_results(second, [good])["correct"] == 1.0
    assert task.process_results(second, [good.replace("b]", "0]")])["correct"] == 0.0
