"""Hands the rows of a batch job to engines in Ray actors, and their answers to the journal."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vllm_idlm.batch.errors import BatchError
from vllm_idlm.batch.journal import Journal
from vllm_idlm.batch.replica import Replica

DEATHS = 3  # of engines in a row without an answer between them, and the job gives up
PLACE_SECONDS = 60


@dataclass(frozen=True)
class Cluster:
    """Where engines run. address: of a Ray cluster ("auto": the one here); None: one of this run's own."""

    replicas: int = 1
    tensor_parallel: int = 1
    address: str | None = None


@dataclass
class _Engine:
    """One actor, and what it was given: rows by index, and the calls under way."""

    group: Any
    actor: Any
    held: dict[int, dict[str, Any]] = field(default_factory=dict)
    calls: int = 0


class Driver:
    """Keeps every engine busy with `in_flight` rows. tell: takes the number of new answers, or a line of words."""

    def __init__(
        self,
        journal: Journal,
        rows: list[dict[str, Any]],
        engine: dict[str, Any],
        in_flight: int,
        cluster: Cluster,
        tell: Callable[[int | str], None],
    ) -> None:
        self.journal, self.engine, self.in_flight, self.cluster, self.tell = journal, engine, in_flight, cluster, tell
        done = journal.done
        self.waiting = deque(row for row in rows if row["index"] not in done)
        self.calls: dict[Any, _Engine] = {}
        self.deaths = 0

    def run(self) -> None:
        """Answer every row that is not answered yet. Raises BatchError; what is answered by then stays answered."""
        if not self.waiting:
            return
        import ray

        self.device = connect(self.cluster)
        try:
            for engine in [self._start() for _ in range(min(self.cluster.replicas, len(self.waiting)))]:
                self._feed(engine)
            while self.calls:
                ready, _ = ray.wait(list(self.calls), num_returns=1)
                self._take(ready[0])
        finally:
            ray.shutdown()

    def _start(self) -> _Engine:
        """An engine in a placement group of its own, a bundle a rank; it is not waited for."""
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as In

        group = placement_group([self._bundle()] * self.cluster.tensor_parallel, strategy="PACK")
        if not group.wait(PLACE_SECONDS):
            raise BatchError(
                f"the Ray cluster has no room for an engine of {self.cluster.tensor_parallel} x {self._bundle()} "
                f"within {PLACE_SECONDS} s; see `ray status`, or lower --replicas"
            )
        strategy = In(group, placement_group_bundle_index=0, placement_group_capture_child_tasks=True)
        alone = {"num_gpus": 1} if self.device == "GPU" and self.cluster.tensor_parallel == 1 else {}
        actor = ray.remote(Replica).options(num_cpus=0, scheduling_strategy=strategy, **alone).remote(self.engine)
        return _Engine(group, actor)

    def _bundle(self) -> dict[str, int]:
        return {"CPU": 1} if self.device == "CPU" else {"GPU": 1, "CPU": 1}

    def _feed(self, engine: _Engine) -> None:
        """Give rows up to `in_flight`. Two calls are kept under way: the engine never waits for this process."""
        rows = []
        while self.waiting and len(engine.held) < self.in_flight:
            row = self.waiting.popleft()
            engine.held[row["index"]] = row
            rows.append(row)
        while engine.held and engine.calls < 2:
            self.calls[engine.actor.turn.remote(rows)] = engine
            engine.calls, rows = engine.calls + 1, []

    def _take(self, call: Any) -> None:
        """A call has ended: keep its answers, or replace its engine."""
        import ray

        engine = self.calls.pop(call)
        engine.calls -= 1
        try:
            answers = ray.get(call)
        except ray.exceptions.RayError as error:
            self._replace(engine, error)
            return
        if answers:
            self.deaths = 0
            self.journal.add(answers)
            for answer in answers:
                del engine.held[answer["index"]]
            self.tell(len(answers))
        self._feed(engine)

    def _replace(self, engine: _Engine, error: Exception) -> None:
        """Its rows go back to the front of the queue, and another engine is started in its place."""
        import ray
        from ray.util import remove_placement_group

        self.calls = {call: other for call, other in self.calls.items() if other is not engine}
        self.waiting.extendleft(engine.held[index] for index in sorted(engine.held, reverse=True))
        ray.kill(engine.actor)
        remove_placement_group(engine.group)
        self.deaths += 1
        reason = _reason(error)
        if self.deaths >= DEATHS or isinstance(error, ray.exceptions.ActorUnschedulableError) or _at_start(error):
            rows = ", ".join(map(str, sorted(engine.held)[:8]))
            raise BatchError(
                f"an engine ended {self.deaths} time(s) without an answer (rows {rows} ..): {reason}. "
                f"{len(self.journal.done)} of {self.journal.rows} rows are answered and kept; run the command again"
            ) from None
        self.tell(f"an engine ended ({reason}); its {len(engine.held)} rows go to a new one")
        self._feed(self._start())


def _at_start(error: Exception) -> bool:
    """Whether the engine could not even start: another would not either."""
    return "The actor died because of an error raised in its creation task" in str(error)


def _reason(error: Exception) -> str:
    """The last line of an error that says something: Ray quotes whole tracebacks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:500] if lines else type(error).__name__


def connect(cluster: Cluster) -> str:
    """Join the Ray cluster, or start one on this machine: what devices it counts, "GPU" or "CPU". Raises BatchError."""
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    where = {"include_dashboard": False} if cluster.address is None else {"address": cluster.address}
    need = cluster.replicas * cluster.tensor_parallel
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", **where)
    except Exception as error:  # a connection's, an authentication's, a start's
        at = cluster.address or "a cluster of this run's own"
        raise BatchError(f"--address {at}: Ray cannot be reached or started: {_reason(error)}") from None
    found = ray.cluster_resources()
    device = "GPU" if found.get("GPU") else "CPU"
    if found.get(device, 0) < need:
        ray.shutdown()
        raise BatchError(
            f"--replicas {cluster.replicas} of --tensor-parallel {cluster.tensor_parallel} need {need} {device}s, the "
            f"Ray cluster has {found.get(device, 0):g}; lower one of them, or add nodes"
        )
    return device
