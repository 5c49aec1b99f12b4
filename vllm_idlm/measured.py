"""What was measured of the speed of ISD: our results and the authors' published table, to hold the planner against."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from vllm_idlm import planner

CPU = "cpu-2-cores"  # of configs/hardware: what our CPU figures are held against
RANK = 32  # of the embedded adapter, with which our CPU figures were taken
_CPU_CONTEXT = 80  # tokens in the cache on average in benchmarks.overhead and benchmarks.coverage
_Reader = Callable[[str, dict[str, Any]], Iterator["Point"]]  # (file, its content) -> points


@dataclass(frozen=True)
class Point:
    """One measurement of ISD beside plain decoding. Times in ms a forward; tokens/s of all requests together."""

    source: str
    model: str  # a name of `planner.SHAPES`, or of the zoo
    hardware: str  # of configs/hardware
    method: str  # isd or risd
    n: int
    groups: int  # extra groups of masks: 0 is coverage "last"
    rank: int
    requests: int
    context: int
    tpf: float
    oh: float
    plain_ms: float
    isd_ms: float | None = None  # what that engine spends on ISD a step, if it is not ours

    @property
    def speedup(self) -> float:
        """Over plain decoding."""
        return self.tpf / self.oh

    @property
    def tokens_per_s(self) -> float:
        """Of all requests."""
        return self.requests * self.tpf / (self.plain_ms * self.oh) * 1e3

    def table(self) -> dict[str, Any]:
        """All figures, as plain JSON."""
        return {**asdict(self), "speedup": self.speedup, "tokens_per_s": self.tokens_per_s}


def results() -> Path | None:
    """`benchmarks/results` of this checkout; None where the package is installed without it."""
    found = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
    return found if found.is_dir() else None


def points(folder: Path | None = None) -> list[Point]:
    """All measurements of step times: the published ones, and those in `folder` (default: `results()`).

    A result of another processor than the device's own is not among them: see `elsewhere`.
    """
    shipped = Path(str(files("vllm_idlm.configs"))) / "measured"
    found = [p for file in sorted(shipped.glob("*.yaml")) for p in _published(file)]
    for name, record, read in _records(folder):
        if _processor(record) == planner.hardware(CPU).processor:
            found += read(name, record)
    return found


def elsewhere(folder: Path | None = None) -> list[tuple[str, str]]:
    """(file, processor) of the results in `folder` from another processor than the device's: no points of theirs."""
    found = [(name, _processor(record)) for name, record, _ in _records(folder)]
    return [(name, cpu) for name, cpu in found if cpu != planner.hardware(CPU).processor]


def _records(folder: Path | None) -> Iterator[tuple[str, dict[str, Any], _Reader]]:
    """(file, content, what reads its points) of every result of step times."""
    folder = folder or results()
    for file in sorted(folder.glob("*.json")) if folder else []:
        record = json.loads(file.read_text(encoding="utf-8"))
        if str(record.get("provenance", {}).get("command", "")).startswith("idlm bench"):
            yield file.name, record, _bench
            continue
        read = _READERS.get(str(record.get("command", "")).split(" --")[0].strip())
        if read and not (record.get("result") or {}).get("shape"):  # shapes with dummy weights: GPU runs, not fitted
            yield file.name, record, read


def _processor(record: dict[str, Any]) -> str:
    """The name of the CPU a result was measured on."""
    machine = record.get("machine") or record.get("provenance", {}).get("machine") or {}
    return str(machine.get("cpu", "a processor it does not name"))


def _published(file: Path) -> Iterator[Point]:
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    for requests, plain, isd in content["rows"]:
        yield Point(
            content["source"], content["model"], content["hardware"], "isd", content["n"], 0, 0, requests,
            content["context"], content["tpf"], content["tpf"] * plain / isd, 1e3 / plain, content.get("isd_ms"),
        )  # fmt: skip


def _overhead(file: str, record: dict[str, Any]) -> Iterator[Point]:
    for row in record["result"]["rows"]:
        for method in ("isd", "risd"):
            if method in row:
                yield _cpu(
                    file, method, row["n"], 0, row["batch"], row[method]["TPF"], row[method]["OH"], row["ms"]["plain"]
                )


def _coverage(file: str, record: dict[str, Any]) -> Iterator[Point]:
    result = record["result"]
    n = result["n"]
    for row in result["rows"]:
        plain_ms = 1e3 * row["batch"] / row["plain"]["tokens_per_s"]
        for coverage, groups in (("last", 0), ("all", n - 1)):  # auto varies its rows
            if coverage in row:
                own = row[coverage]
                oh = own["TPF"] / own["speedup"]
                yield _cpu(file, "risd", n, groups, row["batch"], own["TPF"], oh, plain_ms)


def _bench(file: str, report: dict[str, Any]) -> Iterator[Point]:
    """A report of `idlm bench`: the rows of ISD with a fixed coverage, of the embedded model's compiled engines."""
    if report["asked"]["model"] != "smollm2-135m-risd":
        return
    plain = {
        (row["concurrency"], row["temperature"]): row["step_ms"]["median"]
        for row in report["rows"]
        if row["method"] == "plain"
    }
    for row in report["rows"]:
        engine = report["engines"][row["method"]]
        isd, place = engine.get("isd") or {}, (row["concurrency"], row["temperature"])
        if engine["compiled"] and isd.get("coverage") in ("last", "all") and place in plain:
            groups = isd["n"] - 1 if isd["coverage"] == "all" else 0
            method = "risd" if isd.get("lora") else "isd"
            yield _cpu(file, method, isd["n"], groups, place[0], row["TPF"], row["OH"]["median"], plain[place])


def _cpu(file: str, method: str, n: int, groups: int, batch: int, tpf: float, oh: float, plain_ms: float) -> Point:
    rank = RANK if method == "risd" else 0
    return Point(file, "smollm2-135m", CPU, method, n, groups, rank, batch, _CPU_CONTEXT, tpf, oh, plain_ms)


_READERS: dict[str, _Reader] = {
    "python -m benchmarks.overhead": _overhead,
    "python -m benchmarks.coverage": _coverage,
}


@dataclass(frozen=True)
class Error:
    """A measured figure beside the planner's."""

    point: Point
    figure: str  # plain ms, OH, or speed-up (at the measured TPF)
    measured: float
    planned: float

    @property
    def relative(self) -> float:
        """Of the planned figure."""
        return self.planned / self.measured - 1


def errors(found: list[Point]) -> list[Error]:
    """The planner at every point: plain step time, OH, and speed-up. TPF is the measured one: that is not planned."""
    made = []
    for p in found:
        own = {} if p.isd_ms is None else {"isd_ms": p.isd_ms}
        hardware = planner.hardware(p.hardware).model_copy(update=own)
        plan = planner.Plan(planner.shape(p.model), hardware, context=p.context, rank=p.rank)
        plain = plan.step_ms(p.requests, 1)
        oh = plan.step_ms(p.requests, p.n, p.groups) / plain
        made += [
            Error(p, "plain ms", p.plain_ms, plain), Error(p, "OH", p.oh, oh),
            Error(p, "speed-up", p.speedup, p.tpf / oh),
        ]  # fmt: skip
    return made


def tpf_errors(folder: Path | None = None) -> list[tuple[str, float, float]]:
    """(what, served TPF, planned TPF): the formula on the measured acceptance by place, of `benchmarks.acceptance`."""
    folder = folder or results()
    found = []
    for file in sorted(folder.glob("acceptance*.json")) if folder else []:
        result = json.loads(file.read_text(encoding="utf-8"))["result"]
        for row in result["rows"]:
            served = row["served"]
            reached = [served["drafted_per_position"][0], *served["accepted_per_position"]]
            rates = [a / r if r else 0.0 for a, r in zip(served["accepted_per_position"], reached, strict=False)]
            groups = len(rates) if row["coverage"] == "all" else 0
            what = f"{file.name}: {row['coverage']}, temperature {row['temperature']:g}"
            found.append((what, row["tpf"], planner.tpf(rates, groups)))
    return found


def summary(found: list[Error]) -> list[tuple[str, str, int, float, float]]:
    """(source, figure, points, mean absolute error, largest), relative to what was measured."""
    sizes: dict[tuple[str, str], list[float]] = {}
    for e in found:
        sizes.setdefault((e.point.source, e.figure), []).append(abs(e.relative))
    return [(*key, len(errors), sum(errors) / len(errors), max(errors)) for key, errors in sizes.items()]
