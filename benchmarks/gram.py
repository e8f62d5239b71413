"""Contributions compared as wholes: how fast a core measures them, and by how much an AllReduce on Ray gets longer.

The exchange is compared with one whose aggregator only takes the mean. Both are of the same run and take turns: of each
two rounds one measures. What follows the measure is the same work, the sum of all contributions.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

from benchmarks.harness import Row, drive
from starling.algorithms.aggregators.gram import gram
from starling.orchestrator.config.schema import parse
from starling.orchestrator.runtimes.cluster.runtime import Cluster

COUNT, SIZE = 20, 1_000_000
MOST_S = 0.030
NODES = 4
WARM_UP = 8


def measure_rows(repeats: int = 9) -> float:
    """Median seconds of the Gram matrix of ``COUNT`` rows of ``SIZE`` float32 values."""
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal(SIZE, dtype=np.float32) + 1 for _ in range(COUNT)]
    seconds: list[float] = []
    for _ in range(repeats):
        began = time.perf_counter()
        gram(rows)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def measure_exchange(size: int, repeats: int) -> tuple[float, float]:
    """Median seconds of an AllReduce that measures, and of one that does not."""
    found: tuple[list[float], list[float]] = [], []

    def each_round(seconds: list[float]) -> None:
        found[sum(map(len, found)) % 2].append(max(seconds))

    config = parse(
        {
            "rounds": 2 * (WARM_UP + repeats),
            "algorithm": {"name": "benchmarks.workloads:Comparing"},
            "task": {"name": "benchmarks.workloads:Vector", "size": size},
            "evaluation": {"every_rounds": 0},
            "cluster": {"nodes": {"target": NODES}, "nodes_per_actor": 1, "num_cpus": 0.1},
            "tracking": "none",
        }
    )
    drive(config, Cluster(config), each_round)
    with_measure, without = (statistics.median(one[WARM_UP:]) for one in found)
    return with_measure, without


def main(size: int = 10_000_000, repeats: int = 15) -> list[Row]:
    took = measure_rows()
    with_measure, without = measure_exchange(size, repeats)
    what = f"Gram matrix of {COUNT} rows of {SIZE // 1_000_000} M float32 on a core"
    name = f"AllReduce of {size / 1e6:g} M float32 over {NODES} processes, contributions compared, against the mean"
    return [
        Row(what, took, None, f"≤ {MOST_S * 1000:g} ms", took <= MOST_S),
        Row(name, with_measure, without, "≤ 1.1×", with_measure / without <= 1.1),
    ]


if __name__ == "__main__":
    for row in main():
        print(row)
