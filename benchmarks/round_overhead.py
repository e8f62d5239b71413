"""What a round costs without training: one AllReduce of 1 KB, begin to commit."""

from __future__ import annotations

import statistics
import time

from benchmarks.harness import Row, cluster_run, drive, exchange_config
from starling.orchestrator.runtimes.simulator.runtime import Simulator

KILOBYTE = 256  # float32 values
WARM_UP = 20


def simulated(nodes: int, rounds: int) -> float:
    """Median seconds of this machine for a round in the simulator."""
    marks: list[float] = []
    config = exchange_config(KILOBYTE, rounds, nodes)
    drive(config, Simulator(config), lambda _: marks.append(time.perf_counter()))
    return statistics.median(
        after - before for before, after in zip(marks[WARM_UP:], marks[WARM_UP + 1 :], strict=False)
    )


def main() -> list[Row]:
    rows: list[Row] = []
    for nodes, per_actor, text in ((16, 1, "16 nodes in 16 actors"), (64, 8, "64 nodes in 8 actors")):
        seconds = statistics.median(cluster_run(KILOBYTE, rounds=120, nodes=nodes, per_actor=per_actor)[WARM_UP:])
        rows.append(Row(f"A round without training, 1 KB, {text}", seconds, None, "≤ 60 ms", seconds <= 0.060))
    seconds = simulated(64, 200)
    rows.append(Row("A round without training, 1 KB, 64 simulated nodes", seconds, None, "≤ 6 ms", seconds <= 0.006))
    return rows


if __name__ == "__main__":
    for row in main():
        print(row)
