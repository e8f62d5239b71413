"""What an exchange costs Streaming DiLoCo on four nodes, with and without overlap, behind steps that take no core.

The cluster is throttled (``network.bandwidth_mbps``) to a link on which the exchange, one after the other with the
steps, takes 30 % of the time. What is left of it with overlap is what the steps do not hide, and all that a round costs
besides: outer steps, digests, commits.
"""

from __future__ import annotations

import statistics

from benchmarks.harness import Row, drive
from starling.orchestrator.config.schema import Config, parse
from starling.orchestrator.runtimes.cluster.runtime import Cluster

SIZE = 2_500_000
"""Parameters: 10 MB as float32, two fragments of 5."""
NODES = 4
MBIT = 30.0
ROUNDS = 8
WARM_UP = 2
STEPS = 4
"""Of a round."""
EXCHANGE_S = 2 * (NODES - 1) / NODES * SIZE / 2 * 32 / (MBIT * 1e6)
"""Each node sends three quarters of a fragment to be reduced, and three times a quarter of the mean: 2 s."""
STEP_S = EXCHANGE_S * 0.68 / 0.32 / STEPS
LEAST_SHARE, MOST_LOST = 0.3, 0.05


def _config(overlap: int) -> Config:
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
            "task": {"name": "benchmarks.workloads:Vector", "size": SIZE, "step_s": STEP_S},
            "evaluation": {"every_rounds": 0},
            "cluster": {"nodes": {"target": NODES}, "num_cpus": 0.1},
            "network": {"bandwidth_mbps": MBIT},
            "tracking": "none",
        }
    )


def _seconds(overlap: int) -> float:
    config = _config(overlap)
    return statistics.median(drive(config, Cluster(config))[WARM_UP:])


def main() -> list[Row]:
    one_by_one, overlapped = (_seconds(overlap) for overlap in (0, STEPS - 1))
    alone = STEP_S * STEPS
    share, lost = (one_by_one - alone) / one_by_one, (overlapped - alone) / overlapped
    what = (
        f"A round of streaming_diloco on 4 nodes throttled to {MBIT:g} Mbit/s, overlapped ({lost:.1%} lost), "
        f"against not ({share:.0%} lost)"
    )
    return [Row(what, overlapped, one_by_one, "< 5 % lost", lost < MOST_LOST and share >= LEAST_SHARE)]


if __name__ == "__main__":
    for row in main():
        print(row)
