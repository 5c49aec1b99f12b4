"""A `Benchmark` as tasks of lm-evaluation-harness: its own by name, or ones made of documents and a judge."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_idlm.evaluate import programs
from vllm_idlm.evaluate.benchmarks import Benchmark, EvalError

LETTERS = "ABCDEFGHIJ"
_CHOICE = re.compile(r"answer(?:\s+is)?\s*:?\s*\**\s*\(?([A-J])\b", re.IGNORECASE)
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_YES_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def build(benchmark: Benchmark, data: str | None = None) -> list[Any]:
    """The harness's tasks. data: instead of the benchmark's own, a hub data set or a local folder. Raises EvalError."""
    random.seed(benchmark.seed)  # some tasks of the harness shuffle their choices: alike in every run
    try:
        if benchmark.kind == "lm_eval":
            return _harness(benchmark, data)
        if benchmark.kind == "reasoning_gym":
            return [_gym(benchmark, name, options) for name, options in benchmark.tasks.items()]
        return [_MADE[benchmark.kind](benchmark, data or benchmark.data)]
    except EvalError:
        raise
    except ImportError as error:
        raise EvalError(f"{benchmark.name}: {error}. Fix: pip install 'vllm-idlm[eval]'") from None
    except Exception as error:  # of the data sets' libraries: every one has its own
        raise EvalError(
            f"{benchmark.name}: its data cannot be loaded ({type(error).__name__}: {_first(error)}). Without a network "
            f"give a folder: --data {benchmark.name}=FOLDER, with {benchmark.split}.jsonl or the data set's own files"
        ) from None


@functools.cache
def index() -> Any:
    """The harness's index of its tasks; reading it takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _harness(benchmark: Benchmark, data: str | None) -> list[Any]:
    """Tasks of the harness by name. Those that only score given texts are refused: nothing is decoded there."""
    own = {} if data is None else {"dataset_path": data, "dataset_name": None}
    members = [{"task": name, **own, **options} for name, options in benchmark.tasks.items()]
    group = {"group": f"{benchmark.name} of idlm", "task": members}  # in a group a task's settings may be changed
    found = list(index().load([group])["tasks"].values())
    for task in found:
        if task.OUTPUT_TYPE != "generate_until":
            raise EvalError(
                f"{benchmark.name}: the task {task.task_name} scores given texts ({task.OUTPUT_TYPE}); nothing is "
                "decoded, so ISD has no part in it. Fix: name a task that generates its answer (generate_until)"
            )
    return found


def rows(benchmark: Benchmark, data: str) -> list[dict[str, Any]]:
    """Documents from a folder or the hub."""
    import datasets

    if Path(data).is_dir():
        files = sorted(str(p) for p in Path(data).glob("*.jsonl"))
        named = [f for f in files if Path(f).stem.startswith(benchmark.split)] or files
        if named:
            return list(datasets.load_dataset("json", data_files=named, split="train"))
        return list(datasets.load_dataset(data, split=benchmark.split))
    if benchmark.kind == "livecodebench":  # the hub's copy comes with a loading script, which is not run any more
        file = f"hf://datasets/{data}/{benchmark.split}.jsonl"
        return list(datasets.load_dataset("json", data_files=file, split="train"))
    return list(datasets.load_dataset(data, benchmark.subset, split=benchmark.split))


def _humaneval(benchmark: Benchmark, data: str | None) -> Any:
    docs = programs.humaneval_docs() if data in (None, "package") else rows(benchmark, data)
    return _task(benchmark.name, docs, programs.humaneval_text, programs.humaneval_right)


def _mbpp(benchmark: Benchmark, data: str) -> Any:
    return _task(benchmark.name, rows(benchmark, data), programs.mbpp_text, programs.mbpp_right)


def _livecodebench(benchmark: Benchmark, data: str) -> Any:
    docs = rows(benchmark, data)
    return _task(benchmark.name, docs, programs.livecodebench_text, programs.livecodebench_right)


def column(doc: dict[str, Any], benchmark: Benchmark, name: str) -> Any:
    """A column by the name that the data set has for it; dots lead into columns of columns."""
    found: Any = doc
    for part in benchmark.fields.get(name, name).split("."):
        if part not in found:
            raise EvalError(
                f"{benchmark.name}: its data have no column {part!r} (for {name}); there are {', '.join(found)}. "
                f"Fix: fields in configs/eval/{benchmark.name}.yaml"
            )
        found = found[part]
    return found


def letter(gold: Any) -> str:
    """The letter of an answer given as a letter, as an index from 0, or as a digit from 1 in a string."""
    if isinstance(gold, int):
        return LETTERS[gold]
    text = str(gold).strip().upper()
    return LETTERS[int(text) - 1] if text.isdigit() else text


def _choices(benchmark: Benchmark, data: str) -> Any:
    """Questions with lettered options, answered in words: columns question, options, answer."""

    def text(doc: dict[str, Any]) -> str:
        given = zip(LETTERS, column(doc, benchmark, "options"), strict=False)
        options = "\n".join(f"({name}) {option}" for name, option in given)
        asked = "Think step by step, then end with: The answer is (LETTER)."
        return f"{column(doc, benchmark, 'question')}\n{options}\n{asked}"

    def right(doc: dict[str, Any], answer: str) -> bool:
        found = _CHOICE.findall(answer)
        return bool(found) and found[-1].upper() == letter(column(doc, benchmark, "answer"))

    return _task(benchmark.name, rows(benchmark, data), text, right)


def _math(benchmark: Benchmark, data: str) -> Any:
    """Problems with an answer in mathematics, compared by math-verify: columns problem, answer."""
    from math_verify import parse, verify

    def text(doc: dict[str, Any]) -> str:
        return (
            f"{column(doc, benchmark, 'problem')}\nReason step by step, and put your final answer within \\boxed{{}}."
        )

    def right(doc: dict[str, Any], answer: str) -> bool:
        gold = str(column(doc, benchmark, "answer")).split("####")[-1].strip().replace(",", "")
        return bool(verify(parse(f"\\boxed{{{gold}}}"), parse(answer)))

    return _task(benchmark.name, rows(benchmark, data), text, right)


_MADE = {"humaneval": _humaneval, "mbpp": _mbpp, "livecodebench": _livecodebench, "choices": _choices, "math": _math}


def _gym(benchmark: Benchmark, name: str, options: dict[str, Any]) -> Any:
    """A procedural task of reasoning-gym, scored by its own judge; right is the full score only."""
    try:
        import reasoning_gym
    except ImportError:
        raise EvalError(f"{benchmark.name}: pip install reasoning-gym") from None
    made = reasoning_gym.create_dataset(name, size=benchmark.problems, seed=benchmark.seed, **options)
    docs = [{"question": made[i]["question"], "answer": str(made[i]["answer"]), "index": i} for i in range(len(made))]

    def right(doc: dict[str, Any], answer: str) -> bool:
        entry = made[doc["index"]]
        return made.score_answer(answer=final(answer, doc["answer"]), entry=entry) >= 1.0

    return _task(f"{benchmark.name}-{name}", docs, lambda doc: doc["question"], right)


def final(answer: str, gold: str) -> str:
    """The answer proper: in <answer> tags, else the first yes or no or the last number if one is asked, or a line."""
    if tagged := _TAGGED.findall(answer):
        return tagged[-1].strip()
    if _NUMBER.fullmatch(gold) and (found := _NUMBER.findall(answer.replace(",", ""))):
        return found[-1]
    if gold in ("Yes", "No") and (found := _YES_NO.findall(answer)):
        return found[0].capitalize()
    lines = [line.strip() for line in answer.strip().splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else ""


def _task(
    name: str,
    docs: list[dict[str, Any]],
    text: Callable[[dict[str, Any]], str],
    right: Callable[[dict[str, Any], str], bool],
) -> Any:
    """A generating task with the metric `correct`."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    held = [{**doc, "_text": text(doc)} for doc in docs]
    config = {
        "task": name, "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(held)}, "test_split": "test",
        "output_type": "generate_until", "doc_to_text": lambda doc: doc["_text"], "doc_to_target": lambda doc: "",
        "process_results": lambda doc, results: {"correct": float(right(doc, results[0]))},
        "metric_list": [{"metric": "correct", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {"until": [], "max_gen_toks": 1024}, "num_fewshot": 0,
    }  # fmt: skip
    return ConfigurableTask(config=config)
