"""How much of an exchange `Start` … `Wait` hides behind a `Train` that leaves the cores alone."""

from __future__ import annotations

import statistics

from benchmarks.harness import Row, drive
from starling.orchestrator.config.schema import Config, parse
from starling.orchestrator.runtimes.cluster.runtime import Cluster

SIZE = 50_000_000
"""float32 values of the exchange: 200 MB, as of a small language model."""
ROUNDS = 10
WARM_UP = 3


def _config(how: str, seconds: float) -> Config:
    return parse(
        {
            "rounds": ROUNDS,
            "algorithm": {"name": "benchmarks.workloads:Overlapped", "how": how, "size": SIZE},
            "task": {"name": "benchmarks.workloads:Vector", "size": 10, "step_s": seconds},
            "evaluation": {"every_rounds": 0},
            "cluster": {"nodes": {"target": 2}, "num_cpus": 0.1},
            "tracking": "none",
        }
    )


def _seconds(how: str, seconds: float) -> float:
    config = _config(how, seconds)
    return statistics.median(drive(config, Cluster(config))[WARM_UP:])


def main() -> list[Row]:
    exchange = _seconds("exchange", 0.0)
    # The exchange takes 30 % of a round in which both come one after the other.
    train = exchange * 0.7 / 0.3
    sequential = _seconds("sequential", train)
    overlapped = _seconds("overlapped", train)
    alone = _seconds("train", train)
    hidden = (sequential - overlapped) / (sequential - alone)
    what = f"A round whose exchange is 30 % of it, overlapped, against one after the other ({hidden:.0%} hidden)"
    return [Row(what, overlapped, sequential, "≥ 80 % hidden", hidden >= 0.8)]


if __name__ == "__main__":
    for row in main():
        print(row)
