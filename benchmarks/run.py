"""Measure everything and write the table in docs/benchmarks.md: ``make bench``.

With names of benchmarks (``python benchmarks/run.py codecs streaming``) only these are measured, and their rows
replaced, with the day after each.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, with the repository's root as the import root

from benchmarks import (
    all_reduce,
    codecs,
    gram,
    memory,
    overlap,
    parquet,
    recovery,
    round_overhead,
    saving,
    simulator,
    staging,
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
digests, commit. *Contributions compared*: an aggregator that measures them first, and the mean, take turns in one run
(`benchmarks/gram.py`). *Plain loop* is FedAvg by hand: load, train with `torch.optim.SGD`, average
(`benchmarks/simulator.py`). *Hidden* is the share of the exchange's time by which a round gets shorter when it is
started before a `Train` that takes no core, and waited for after it. *Memory above the base* is the peak of a node that
trains on 1 GB of Parquet, less the peak of a node that trains on a small file (`benchmarks/parquet.py`). A node keeps
a few row groups, and reads no other node's.
*Throttled* nodes have the network that `network.bandwidth_mbps` says; what is lost is the share of a round in which
nothing is computed, outer steps and bookkeeping included (`benchmarks/streaming.py`). Where there is a GPU
`benchmarks/staging.py` adds two rows.
*One-byte SPSA* is a round of one node with two
directions; its plain loop does the same forward passes and makes the same noise (`benchmarks/zeroth_order.py`). Its
memory is what a process has in a round above what it has without a model; a *chunk* is 10 MB, in which noise is made.
*A trial of a sweep* is compared with calling `run` for the same configuration, on one Ray (`benchmarks/sweeps.py`).
*Stall* is by how much longer it takes from one
commit to the next when a node is killed in between, at the named moment; the median of three kills each.
*Elasticity* is what every round does in case a node dies: committed copies, digests, asking Ray for its machines, the
pool's decisions; rounds with and without it take turns ([what is promised under losses](failure-semantics.md)).
*Saved* is a round beside which the checkpoint of the one before is written ([checkpoints](checkpoints.md)).
"""


def line(row: Row) -> str:
    ours = f"{row.ours_s:.4g} {row.unit}".strip()
    reference = f"{row.reference_s:.4g} {row.unit}" if row.reference_s else ""
    ratio = f"{row.ours_s / row.reference_s:.2f}×" if row.reference_s else ""
    kept = "" if row.kept is None else "yes" if row.kept else "**no**"
    return f"| {row.what} | {ours} | {reference} | {ratio} | {row.promise} | {kept} |\n"


def replaced(page: str, rows: Sequence[Row], day: str) -> str:
    """The page with these rows in the place of older ones, or behind the others."""
    lines = page.splitlines(keepends=True)
    for row in rows:
        new = line(dataclasses.replace(row, what=f"{row.what} ({day})"))
        table = [place for place, text in enumerate(lines) if text.startswith("| ")]
        old = [place for place in table if _key(lines[place]) == _key(new)]
        if old:
            lines[old[0]] = new
        else:
            lines.insert(table[-1] + 1, new)
    return "".join(lines)


def main() -> None:
    first = (
        zeroth_order,
        simulator,
        round_overhead,
        all_reduce,
        gram,
        codecs,
        overlap,
        streaming,
        staging,
        memory,
        parquet,
    )
    modules = {module.__name__.rpartition(".")[2]: module for module in (*first, recovery, saving, sweeps)}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"Of {', '.join(modules)}; all, by default.")
    names: list[str] = parser.parse_args().names
    unknown = [name for name in names if name not in modules]
    if unknown:
        parser.error(f"there is no benchmark {unknown[0]} (there are: {', '.join(modules)})")
    rows: list[Row] = []
    for name in names or modules:
        for row in modules[name].main():
            print(row, flush=True)
            rows.append(row)
    if names:
        day = str(datetime.now(UTC).date())
        PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), rows, day), encoding="utf-8")
        print(f"written: {PAGE}")
        return
    head = HEAD.format(
        date=datetime.now(UTC).date(),
        machine=platform.machine(),
        cores=os.cpu_count(),
        python=platform.python_version(),
    )
    PAGE.write_text(head + "".join(map(line, rows)) + TAIL, encoding="utf-8")
    print(f"written: {PAGE}")


def _key(text: str) -> str:
    """What a row of the table is about, without what was found and when."""
    return re.sub(r"\([^)]*\)|\s", "", text.removeprefix("|").partition("|")[0])


if __name__ == "__main__":
    main()
