"""The evaluation: every method answers every benchmark, the harness judges, and the answers are held side by side."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_idlm.cli._run import parting
from vllm_idlm.evaluate import statistics
from vllm_idlm.evaluate.answers import Answers
from vllm_idlm.evaluate.benchmarks import Benchmark, EvalError
from vllm_idlm.evaluate.client import Answer, Client
from vllm_idlm.evaluate.server import Method, serve

_SHOWN = 24  # characters on each side of where two answers part
Report = Callable[[str, int, int], None]  # what is being done, how much of it, of how much


@dataclass
class Asked:
    """What is to be evaluated. The first method is the reference of all others."""

    model: str
    methods: list[Method]
    benchmarks: list[Benchmark]
    temperatures: list[float] | None  # None: each benchmark's own
    out: Path
    concurrency: int = 16
    floor: int | None = 4  # concurrency of the second run of the reference; None: no such run
    limit: int | None = None
    flags: list[str] = field(default_factory=list)  # of `vllm serve`
    data: dict[str, str] = field(default_factory=dict)  # benchmark -> hub data set or folder

    def heats(self, benchmark: Benchmark) -> list[float]:
        """The temperatures of a benchmark."""
        if self.temperatures is not None:
            return self.temperatures
        return [0.0 if benchmark.temperature is None else benchmark.temperature]


@dataclass
class Scores:
    """One method on one benchmark at one temperature."""

    right: dict[tuple[str, int], list[bool]] = field(default_factory=dict)  # (task, problem) -> of each sample
    requests: dict[tuple[str, int], list[str]] = field(default_factory=dict)  # -> names of the requests


class Evaluation:
    """Runs `asked`; `result()` is what came of it, as plain JSON."""

    def __init__(self, asked: Asked, report: Report) -> None:
        self.asked, self.report = asked, report
        quiet_harness()
        from vllm_idlm.evaluate import tasks

        self.tasks = {b.name: tasks.build(b, asked.data.get(b.name)) for b in asked.benchmarks}
        self.answers: dict[str, Answers] = {}
        self.scores: dict[tuple[str, str, float], Scores] = {}  # (method, benchmark, temperature)
        self.greedy = any(0.0 in asked.heats(b) for b in asked.benchmarks)

    def run(self) -> dict[str, Any]:
        """All methods, the reference last: its server then weighs where answers part. Raises EvalError."""
        reference, *others = self.asked.methods
        for how in others:
            with self._connection(how) as connect:
                self._score(how.name, connect, self._file(how), self.asked.concurrency)
        with self._connection(reference) as connect:
            self._score(reference.name, connect, self._file(reference), self.asked.concurrency)
            if self.asked.floor and self.greedy:
                self._score("floor", connect, self._file(reference, self.asked.floor), self.asked.floor)
            return self._result(connect)

    @contextlib.contextmanager
    def _connection(self, how: Method) -> Any:
        """A function that gives the method's client; its server starts when that is called first."""
        with contextlib.ExitStack() as stack:
            held: list[Client] = []

            def connect() -> Client:
                if not held:
                    self.report(f"{how.name}: starting the server", 0, 0)
                    url = how.url or stack.enter_context(serve(self.asked.model, how, self.asked.flags))
                    held.append(Client(url))
                return held[0]

            yield connect

    def _file(self, how: Method, concurrency: int | None = None) -> Answers:
        """The file of a method's answers; the reference has a second one at the floor's concurrency."""
        name = how.name if concurrency is None else "floor"
        made = {"model": self.asked.model, "method": how.name, "speculation": how.speculation, "url": how.url}
        made |= {"flags": self.asked.flags, "concurrency": concurrency or self.asked.concurrency}
        found = self.answers[name] = Answers(self.asked.out / "answers" / f"{name.replace(':', '-')}.jsonl", made)
        return found

    def _score(self, name: str, connect: Callable[[], Client], answers: Answers, concurrency: int) -> None:
        from vllm_idlm.evaluate.model import Served

        for benchmark in self.asked.benchmarks:
            for heat in self.asked.heats(benchmark):
                if name == "floor" and heat > 0:
                    continue
                what = f"{name}: {benchmark.name} at temperature {heat:g}"
                model = Served(connect, answers, concurrency, lambda i, n, what=what: self.report(what, i, n))
                found = self.scores[name, benchmark.name, heat] = Scores()
                for round_ in range(benchmark.samples if heat > 0 else 1):
                    model.aim(benchmark, heat, round_)
                    self._judge(model, benchmark, found)

    def _judge(self, model: Any, benchmark: Benchmark, found: Scores) -> None:
        """One answer to every problem, judged by the harness."""
        from lm_eval import simple_evaluate

        result = simple_evaluate(
            model, tasks=self.tasks[benchmark.name], limit=self.asked.limit, apply_chat_template=True,
            system_instruction=benchmark.system, bootstrap_iters=0, log_samples=True, confirm_run_unsafe_code=True,
        )  # fmt: skip
        for task, samples in result["samples"].items():
            for sample in samples:
                if benchmark.filter not in (None, sample["filter"]):
                    continue
                if benchmark.metric not in sample:
                    raise EvalError(
                        f"{benchmark.name}: metric {benchmark.metric!r} is none of the task's: {sample.get('metrics')}"
                    )
                place = (task, sample["doc_id"])
                found.right.setdefault(place, []).append(bool(sample[benchmark.metric] >= 1))
                found.requests.setdefault(place, []).append(model.asked[place])

    def _result(self, connect: Callable[[], Client]) -> dict[str, Any]:
        reference = self.asked.methods[0].name
        cases = [
            self._case(reference, name, benchmark, heat, connect)
            for benchmark in self.asked.benchmarks
            for heat in self.asked.heats(benchmark)
            for name in [*(m.name for m in self.asked.methods), "floor"]
            if (name, benchmark.name, heat) in self.scores
        ]
        counted = {name: counters(a) for name, a in self.answers.items() if name != "floor"}
        return {"cases": cases, "counters": counted}

    def _case(
        self, reference: str, name: str, benchmark: Benchmark, heat: float, connect: Callable[[], Client]
    ) -> dict[str, Any]:
        """One line of the report."""
        own, other = self.scores[name, benchmark.name, heat], self.scores[reference, benchmark.name, heat]
        places = sorted(own.right)
        right, total = sum(map(sum, own.right.values())), sum(map(len, own.right.values()))
        low, high = statistics.interval(right, total)
        case: dict[str, Any] = {
            "benchmark": benchmark.name, "temperature": heat, "method": name, "problems": len(places),
            "samples": benchmark.samples if heat > 0 else 1, "right": right, "answers": total,
            "accuracy": right / total, "interval": [low, high],
        }  # fmt: skip
        if name != reference:
            paired = statistics.paired([other.right[p] for p in places], [own.right[p] for p in places])
            case["against_reference"] = asdict(paired)
        if heat == 0 and name != reference:
            parted = self._parted(reference, name, other, own)
            case |= {"identical": len(places) - len(parted), "differences": self._weighed(name, parted, connect)}
        return case

    def _parted(self, reference: str, name: str, theirs: Scores, ours: Scores) -> list[dict[str, Any]]:
        """The answers that are not the same text, with the place where they part."""
        found = []
        for place, (request,) in sorted(ours.requests.items()):
            a, b = self.answers[reference].held[theirs.requests[place][0]], self.answers[name].held[request]
            if a.text != b.text:
                where = {"task": place[0], "problem": place[1], "request": request}
                where |= {"right": [theirs.right[place][0], ours.right[place][0]], **_shown(a.text, b.text)}
                found.append({**where, "token": parting(a.token_ids or [], b.token_ids or [])})
        return found

    def _weighed(self, name: str, parted: list[dict[str, Any]], connect: Callable[[], Client]) -> list[dict[str, Any]]:
        """Each difference with the reference's own gap (nats) between the two tokens where they part."""
        reference, log = self.answers[self.asked.methods[0].name], self.answers[name]
        wanted = {}
        for d in parted:
            a, b = reference.held[d["request"]], log.held[d["request"]]
            if d["request"] not in log.gaps and (place := _place(a, b, d["token"])):
                wanted[d["request"]] = place
        if wanted:
            found = connect().gaps(list(wanted.values()), self.asked.concurrency)
            for request, gap in zip(wanted, found, strict=True):
                log.put_gap(request, gap)
        return [{**d, "gap": log.gaps.get(d["request"])} for d in parted]


def _place(a: Answer, b: Answer, token: int | None) -> tuple[list[int], int, int] | None:
    """What was before the parting, and the two tokens; None if one answer ended there or the ids are not known."""
    if token is None or not a.prompt_token_ids or token >= min(len(a.token_ids or []), len(b.token_ids or [])):
        return None
    return [*a.prompt_token_ids, *a.token_ids[:token]], a.token_ids[token], b.token_ids[token]


def _shown(a: str, b: str) -> dict[str, Any]:
    """Where two texts part: what is before, and how each goes on."""
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return {
        "character": at,
        "before": a[max(at - _SHOWN, 0) : at],
        "reference": a[at:][:_SHOWN],
        "other": b[at:][:_SHOWN],
    }


def counters(answers: Answers) -> dict[str, float]:
    """Forwards, tokens, and tokens per forward by the server's own count; empty for a server without ISD."""
    found = dict(answers.counts)
    if found.get("forwards"):
        found["tpf"] = found["tokens"] / found["forwards"]
    return found


def quiet_harness() -> None:
    """Only the harness's errors, no bars of its own. Raises EvalError where it is not installed."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise EvalError("lm-evaluation-harness is not installed. Fix: pip install 'vllm-idlm[eval]'") from None
    for name in ("lm_eval", "lm-eval", "httpx", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
