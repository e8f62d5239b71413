"""Many histories, in processes of their own; those that go wrong are shrunk and printed as configurations."""

from __future__ import annotations

import random
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
import yaml

from tests.soak.histories import draw
from tests.soak.shrink import shrink
from tests.soak.watch import Wrong, ends, live

CHUNK = 20
"""Histories that a process lives through before it says so; after some chunks another takes its place."""


def one(seed: str) -> tuple[str, str]:
    """Live through the history of a seed: how it ended, and what is to be said of it."""
    torch.set_num_threads(1)
    raw = draw(random.Random(seed))
    try:
        return live(raw), ""
    except Wrong as wrong:
        first = wrong

    def fails(smaller: dict[str, Any]) -> bool:
        try:
            live(smaller)
        except Wrong as again:
            return again.kind == first.kind
        return False

    small = shrink(raw, fails)
    try:
        live(small)
    except Wrong as again:
        first = again
    return f"WRONG {first.kind}", f"--- seed {seed}: {first}\n{yaml.safe_dump(small, sort_keys=False)}"


def chunk(seeds: list[str]) -> list[tuple[str, str]]:
    return [one(seed) for seed in seeds]


def main(number: int, seed: str, processes: int = 1) -> int:
    """Return the exit code."""
    seeds = [f"{seed}:{place}" for place in range(number)]
    chunks = [seeds[start : start + CHUNK] for start in range(0, number, CHUNK)]
    counts: Counter[str] = Counter()
    began = said = time.monotonic()
    # A process that has done its share is followed by another: what torch and its caches keep is bounded. All are
    # forked from one that has imported everything, which takes as long as ten histories, and has no threads.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(processes, mp_context=context, max_tasks_per_child=50) as pool:
        for results in pool.map(chunk, chunks):
            for end, text in results:
                counts[end] += 1
                if text:
                    print(text, flush=True)  # noqa: T201 - what a command is asked for
            if time.monotonic() - said > 10 or counts.total() == number:
                said = time.monotonic()
                print(f"{counts.total()} of {number} in {said - began:.0f} s: {ends(counts)}", flush=True)  # noqa: T201
    return int(any(end.startswith("WRONG") for end in counts))
