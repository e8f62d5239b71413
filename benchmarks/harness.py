"""What the benchmarks share: rows of the table, a stopwatch, and runs of the bare exchange on a cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from starling.orchestrator.config.schema import Config, parse
from starling.orchestrator.control.controller import Controller
from starling.orchestrator.records.observers import Observer, RoundRecord
from starling.orchestrator.runtimes.cluster.runtime import Cluster
from starling.orchestrator.runtimes.interface import Runtime


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    ours_s: float
    reference_s: float | None
    """``None``: the promise is in seconds, not in a ratio."""
    promise: str = ""
    kept: bool | None = None
    """``None``: nothing is promised."""
    unit: str = "s"

    def __str__(self) -> str:
        ratio = f", {self.ours_s / self.reference_s:.2f}x of {self.reference_s:.4f} s" if self.reference_s else ""
        promised = "" if self.kept is None else f" (promised {self.promise}: {'yes' if self.kept else 'NO'})"
        return f"{self.what}: {self.ours_s:.4f} {self.unit}{ratio}{promised}"


class Watch:
    """A stopwatch."""

    def start(self) -> None:
        self._began = time.perf_counter()

    def stop(self) -> float:
        return time.perf_counter() - self._began


class _Rounds(Observer):
    """Hands on, after each round, the seconds that the nodes printed for their ``AllReduce``."""

    def __init__(self, each_round: Callable[[list[float]], None]) -> None:
        self._each_round = each_round
        self._printed: list[float] = []
        self.rounds: list[float] = []

    def on_log(self, node: int, lines: Sequence[str]) -> None:
        self._printed += [float(line.split()[1]) for line in lines if line.startswith("all_reduce ")]

    def on_round(self, record: RoundRecord) -> None:
        self.rounds.append(record.seconds)
        printed, self._printed = self._printed, []
        self._each_round(printed)


def exchange_config(size: int, rounds: int, nodes: int, per_actor: int = 1, *, timed: bool = False) -> Config:
    """A run whose rounds are one AllReduce of ``size`` float32 values."""
    return parse(
        {
            "rounds": rounds,
            "algorithm": {"name": "benchmarks.workloads:ExchangeOnly", "timed": timed},
            "task": {"name": "benchmarks.workloads:Vector", "size": size},
            "evaluation": {"every_rounds": 0},
            "cluster": {"nodes": {"target": nodes}, "nodes_per_actor": per_actor, "num_cpus": 0.1},
            "tracking": "none",
        }
    )


def drive(config: Config, runtime: Runtime, each_round: Callable[[list[float]], None] = lambda _: None) -> list[float]:
    """Run to the end; return the seconds of each round on the runtime's clock."""
    observer = _Rounds(each_round)
    try:
        Controller(config, runtime, observer, run_id="benchmark", run_dir="").run()
    finally:
        runtime.close()
    return observer.rounds


def cluster_run(
    size: int,
    *,
    rounds: int,
    nodes: int,
    per_actor: int = 1,
    each_round: Callable[[list[float]], None] | None = None,
) -> list[float]:
    """Rounds of the bare exchange on a Ray of our own; ``each_round`` gets the seconds that the nodes measured."""
    config = exchange_config(size, rounds, nodes, per_actor, timed=each_round is not None)
    return drive(config, Cluster(config), each_round or (lambda _: None))
