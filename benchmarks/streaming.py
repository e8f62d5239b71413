"""What an exchange costs Streaming DiLoCo on four nodes, with and without overlap, behind steps that take no core.

The link is whatever the machine has; the steps are made so short that without overlap the exchange is 30 % of the time.
"""

from __future__ import annotations

import statistics

from benchmarks.harness import Row, drive
from orchestrator.cluster import Cluster
from orchestrator.config import Config, parse

SIZE = 25_000_000
"""Parameters: 100 MB as float32, two fragments of 50."""
NODES = 4
ROUNDS = 12
WARM_UP = 4
STEPS = 4
"""Of a round."""


def _config(step_s: float, overlap: int, size: int = SIZE) -> Config:
    return parse(
        {
            "rounds": ROUNDS,
            "algorithm": {
                "name": "streaming_diloco",
                "inner_steps": 2 * STEPS,
                "fragments": 2,
                "pattern": "size",
                "overlap_steps": overlap,
                "codec": "identity",
                "result_codec": "identity",
                "outer": {"name": "sgd", "lr": 0.7},
            },
            "task": {"name": "benchmarks.workloads:Vector", "size": size, "step_s": step_s},
            "evaluation": {"every_rounds": 0},
            "cluster": {"nodes": {"target": NODES}, "num_cpus": 0.1},
            "tracking": "none",
        }
    )


def _seconds(config: Config) -> float:
    return statistics.median(drive(config, Cluster(config))[WARM_UP:])


def main() -> list[Row]:
    cost = _seconds(_config(0.0, 0))
    step_s = cost * 0.7 / 0.3 / STEPS
    one_by_one, overlapped = (_seconds(_config(step_s, overlap)) for overlap in (0, STEPS - 1))
    # The same round with nothing to exchange: steps, optimizer and bookkeeping.
    alone = step_s * STEPS
    share, lost = (one_by_one - alone) / one_by_one, (overlapped - alone) / overlapped
    what = f"A round of streaming_diloco on 4 nodes, overlapped ({lost:.0%} lost), against not ({share:.0%} lost)"
    return [Row(what, overlapped, one_by_one, "< 5 % lost", lost < 0.05)]


if __name__ == "__main__":
    for row in main():
        print(row)
