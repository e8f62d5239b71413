"""What overlapped streaming costs a node that trains on a GPU, and how fast fragments come down and go up again.

One node with the GPU to itself, and a model of more than 100 million parameters. Where there is no GPU it says so.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import Row, drive
from starling.algorithms.low_communication.fragments import to_device, to_host
from starling.orchestrator.config.schema import Config, parse
from starling.orchestrator.runtimes.cluster.runtime import Cluster

MODEL = {"layers": 15, "width": 768, "heads": 12}
"""106 million parameters in blocks."""
FRAGMENTS = 5
STEPS = 25
"""Of a round; one fragment travels in each."""
ROUNDS = 8
WARM_UP = 3
FRAGMENT_VALUES = 106_000_000 // FRAGMENTS
REPEATS = 9
MOST_LOST = 0.03


def _config(algorithm: dict[str, Any]) -> Config:
    return parse(
        {
            "rounds": ROUNDS,
            "algorithm": algorithm,
            "task": {"name": "text_lm", "model": MODEL, "context": 256},
            "data": {"batch_size": 16},
            "optimizer": {"name": "adamw", "lr": 3e-4, "precision": "bf16"},
            "evaluation": {"every_rounds": 0, "max_batches": 1},
            "cluster": {"nodes": {"target": 1}, "num_gpus": 1},
            "tracking": "none",
        }
    )


def _seconds(algorithm: dict[str, Any]) -> float:
    config = _config(algorithm)
    return statistics.median(drive(config, Cluster(config))[WARM_UP:])


def _rate(move: Callable[[], torch.Tensor]) -> float:
    """GB/s of moving a fragment."""
    took: list[float] = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        move()
        torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    return 4 * FRAGMENT_VALUES / statistics.median(took) / 1e9


def main() -> list[Row]:
    if not torch.cuda.is_available():
        print("staging: no CUDA device, nothing is measured")
        return []
    streaming = {
        "name": "streaming_diloco",
        "inner_steps": STEPS * FRAGMENTS,
        "fragments": FRAGMENTS,
        "overlap_steps": 5,
    }
    alone, streamed = _seconds({"name": "benchmarks.workloads:Plain", "steps": STEPS}), _seconds(streaming)
    lost = streamed / alone - 1
    values = torch.randn(FRAGMENT_VALUES, device="cuda")
    host = to_host(values)
    down, up = _rate(lambda: to_host(values)), _rate(lambda: to_device(host, values.device))
    what = f"A round of {STEPS} steps on a GPU, 107 M parameters, streaming against plain ({lost:.1%} lost)"
    staged = f"A fragment of {4 * FRAGMENT_VALUES / 1e6:.0f} MB, GPU to host, GB/s ({up:.1f} the other way)"
    return [
        Row(what, streamed, alone, "< 3 % lost", lost < MOST_LOST),
        Row(staged, down, None, unit="GB/s"),
    ]


if __name__ == "__main__":
    for row in main():
        print(row)
