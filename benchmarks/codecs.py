"""How fast a core encodes and decodes float32 values."""

from __future__ import annotations

import statistics
import time

import torch

from benchmarks.harness import Row
from starling.algorithms.codecs import Codec
from starling.algorithms.codecs.fp4 import FP4
from starling.algorithms.codecs.int8 import Int8

SIZE = 25_000_000
"""Values: 100 MB."""
REPEATS = 7
LEAST_GB_PER_S = 0.5


def _seconds(codec: Codec, values: torch.Tensor) -> float:
    began = time.perf_counter()
    codec.decode(codec.encode(values), SIZE, torch.float32)
    return time.perf_counter() - began


def main() -> list[Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        values = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
        rows: list[Row] = []
        for codec in (FP4(), Int8()):
            took = statistics.median(_seconds(codec, values) for _ in range(REPEATS))
            rate = 4 * SIZE / took / 1e9
            what = f"{codec.name}: 100 MB of float32 encoded and decoded on a core ({rate:.2f} GB/s)"
            rows.append(Row(what, took, None, f"≥ {LEAST_GB_PER_S:g} GB/s", rate >= LEAST_GB_PER_S))
        return rows
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    for row in main():
        print(row)
