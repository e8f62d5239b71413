"""AllReduce over 4 node actors on this machine against gloo's all_reduce over 4 processes, alternating in one run.

Ours is measured inside the programs, from before the ``await`` to after it, gloo's from before the call to after it;
the slowest of the four counts in both. Whatever else the machine does hits both alike, since they take turns.
"""

from __future__ import annotations

import socket
import statistics
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from benchmarks.harness import Row, Watch, cluster_run

NODES = 4
WARM_UP = 8


def _gloo(rank: int, size: int, port: int, pipes: list[Any]) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=NODES)
    values = torch.ones(size)
    watch = Watch()
    while pipes[rank].recv():
        dist.barrier()
        watch.start()
        dist.all_reduce(values)
        pipes[rank].send(watch.stop())
    dist.destroy_process_group()


class Gloo:
    """Four processes that wait to be told to reduce."""

    def __init__(self, size: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        ends = [context.Pipe() for _ in range(NODES)]
        self._pipes = [ours for ours, _ in ends]
        theirs = [end for _, end in ends]
        self._processes = multiprocessing.spawn(_gloo, args=(size, port, theirs), nprocs=NODES, join=False)

    def all_reduce(self) -> float:
        for pipe in self._pipes:
            pipe.send(True)
        return max(pipe.recv() for pipe in self._pipes)

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(False)
        self._processes.join(timeout=30)


def measure(size: int, repeats: int) -> tuple[float, float]:
    """Median seconds of ours and of gloo's."""
    gloo = Gloo(size)
    ours: list[float] = []
    theirs: list[float] = []

    def each_round(seconds: list[float]) -> None:
        ours.append(max(seconds))
        theirs.append(gloo.all_reduce())

    try:
        cluster_run(size, rounds=WARM_UP + repeats, nodes=NODES, each_round=each_round)
    finally:
        gloo.close()
    return statistics.median(ours[WARM_UP:]), statistics.median(theirs[WARM_UP:])


def main() -> list[Row]:
    rows: list[Row] = []
    for size, limit in ((10_000_000, 1.2), (50_000_000, 1.0)):
        ours, gloo = measure(size, repeats=15)
        name = f"AllReduce of {size // 1_000_000} M float32 over {NODES} processes, against gloo"
        rows.append(Row(name, ours, gloo, f"≤ {limit:g}×", ours / gloo <= limit))
    return rows


if __name__ == "__main__":
    for row in main():
        print(row)
