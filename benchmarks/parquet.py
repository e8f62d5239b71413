"""Memory of nodes that train on 1 GB of Parquet, against the same run on a small file: what is promised is 300 MB more.

Two runs of DiLoCo on four nodes, the same model and batches; they differ in the file alone: 4 000 000 rows of 64
float32 features in 245 row groups of 16 384, and 8 192 rows. Sampled are the nodes' own memory (RssAnon) and all that
is resident (VmRSS), at their peak. The base is what a node of the small run has at its peak.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.harness import Row
from benchmarks.memory import Peaks
from starling.orchestrator.config.schema import parse
from starling.orchestrator.control.controller import Controller
from starling.orchestrator.runtimes.cluster.runtime import Cluster

NODES = 4
FEATURES = 64
ROWS_PER_GROUP = 16_384
LARGE, SMALL = 4_000_000, 8_192
MEGABYTE = 1_000_000
PROMISED = 300 * MEGABYTE


def write(path: Path, num_rows: int) -> None:
    """Random features, and a label that depends on them, a row group at a time."""
    rng = np.random.default_rng(0)
    columns = [pa.field(f"x{number}", pa.float32()) for number in range(FEATURES)]
    schema = pa.schema([*columns, pa.field("y", pa.int64())])
    # Neither compressed nor as a dictionary: random numbers are 4 bytes each on the disk as well.
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for start in range(0, num_rows, ROWS_PER_GROUP):
            features = rng.standard_normal((FEATURES, min(ROWS_PER_GROUP, num_rows - start)), dtype=np.float32)
            labels = (features[:4].sum(0) > 0).astype(np.int64)
            writer.write_table(pa.Table.from_arrays([*map(pa.array, features), pa.array(labels)], schema=schema))


def peaks(path: Path, steps: int) -> tuple[int, int]:
    """The largest own and resident memory of a node of a run."""
    config = parse(
        {
            "rounds": 2,
            "algorithm": {"name": "diloco", "inner_steps": steps},
            "task": {"name": "parquet", "path": str(path), "label": "y", "whole_row_groups": path.stat().st_size > 1e8},
            "data": {"batch_size": 512},
            "evaluation": {"every_rounds": 0},
            "cluster": {"nodes": {"target": NODES}, "round_deadline_s": 600},
            "tracking": "none",
        }
    )
    observer = Peaks("parquet")
    runtime = Cluster(config)
    try:
        Controller(config, runtime, observer, run_id="benchmark", run_dir="").run()
    finally:
        observer.over.set()
        runtime.close()
    return max(observer.peaks.values()), max(observer.resident.values())


def main() -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="starling-parquet-") as folder:
        large, small = Path(folder) / "large.parquet", Path(folder) / "small.parquet"
        write(large, LARGE)
        write(small, SMALL)
        # A full epoch of each node's quarter, less the held-out tenth, at 512 rows a step, over both rounds.
        steps = LARGE * 9 // 10 // NODES // 512 // 2
        size = large.stat().st_size
        base, base_resident = peaks(small, 20)
        most, most_resident = peaks(large, steps)
    print(f"  parquet: {size / 1e9:.2f} GB; own memory {base / 1e6:.0f} → {most / 1e6:.0f} MB, ", end="")
    print(f"resident {base_resident / 1e6:.0f} → {most_resident / 1e6:.0f} MB")
    above = max(most - base, most_resident - base_resident)
    what = f"Memory of a node above the base, {size / 1e9:.2g} GB of Parquet over {NODES} nodes, peak, in GB"
    return [Row(what, above / 1e9, PROMISED / 1e9, "< 0.3 GB", above < PROMISED)]


if __name__ == "__main__":
    for row in main():
        print(row)
