"""Measure everything and write the table in docs/benchmarks.md: ``make bench``."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, with the repository's root as the import root

from benchmarks import (
    all_reduce,
    codecs,
    memory,
    overlap,
    parquet,
    recovery,
    round_overhead,
    simulator,
    streaming,
    sweeps,
    zeroth_order,
)
from benchmarks.harness import Row

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"

HEAD = """# Benchmarks

Written by `make bench`, which measures ours and what it is compared with side by side, in one run, on one machine.
Medians; lower is better. The machine decides the seconds; the ratios are what travels.

Measured on {date}: {machine}, {cores} cores, Python {python}.

| what | ours | reference | ratio | promised | kept |
|---|---:|---:|---:|---|---|
"""

TAIL = """
*AllReduce* is one operation as a program awaits it, through Ray's object store, against `torch.distributed.all_reduce`
with gloo over as many processes. *A round without training* is everything else that a round costs: begin, one exchange,
digests, commit. *Plain loop* is FedAvg by hand: load, train with `torch.optim.SGD`, average
(`benchmarks/simulator.py`). *Hidden* is the share of the exchange's time by which a round gets shorter when it is
started before a `Train` that takes no core, and waited for after it. *Memory above the base* is the peak of a node that
trains on 1 GB of Parquet, over that of a node of the same run on a small file (`benchmarks/parquet.py`): a node keeps
a few row groups, and reads no other node's.
*One-byte SPSA* is a round of one node with two
directions; its plain loop does the same forward passes and makes the same noise (`benchmarks/zeroth_order.py`).
*A trial of a sweep* is compared with calling `run` for the same configuration, on one Ray (`benchmarks/sweeps.py`).
*Stall* is by how much longer it takes from one
commit to the next when a node is killed in between, at the named moment; the median of three kills each.
*Elasticity* is what every round does in case a node dies: committed copies, digests, asking Ray for its machines, the
pool's decisions; rounds with and without it take turns ([what is promised under losses](failure-semantics.md)).
"""


def line(row: Row) -> str:
    ours = f"{row.ours_s:.4g} {row.unit}".strip()
    reference = f"{row.reference_s:.4g} {row.unit}" if row.reference_s else ""
    ratio = f"{row.ours_s / row.reference_s:.2f}×" if row.reference_s else ""
    kept = "" if row.kept is None else "yes" if row.kept else "**no**"
    return f"| {row.what} | {ours} | {reference} | {ratio} | {row.promise} | {kept} |\n"


def main() -> None:
    rows: list[Row] = []
    first = zeroth_order, simulator, round_overhead, all_reduce, codecs, overlap, streaming, memory, parquet
    for module in (*first, recovery, sweeps):
        for row in module.main():
            print(row, flush=True)
            rows.append(row)
    head = HEAD.format(
        date=datetime.now(UTC).date(),
        machine=platform.machine(),
        cores=os.cpu_count(),
        python=platform.python_version(),
    )
    PAGE.write_text(head + "".join(map(line, rows)) + TAIL, encoding="utf-8")
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
