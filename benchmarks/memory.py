"""Memory of a node actor in a DiLoCo round, against what is promised.

Promised per node, P being the bytes of the parameters: parameters, gradient and inner optimizer; the declared state
(anchor and momentum, 2 P); the committed copy, P; P per open exchange; the shared state that a round replaces, 2 P;
2 P of temporaries; and 300 MB. The peak of the process's own memory is sampled while it runs: what lies in Ray's store
is the store's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import Row
from starling.orchestrator.config.schema import parse
from starling.orchestrator.control.controller import Controller
from starling.orchestrator.records.observers import Observer, RoundRecord, Started
from starling.orchestrator.runtimes.cluster.runtime import Cluster

SIZE = 25_000_000
MEGABYTE = 1_000_000


class Peaks(Observer):
    """Samples the memory of the node processes until the run ends."""

    def __init__(self, label: str) -> None:
        self._label = label
        self.peaks: dict[int, int] = {}
        """Anonymous memory by process, in bytes."""
        self.resident: dict[int, int] = {}
        """All that is resident, pages of files and of Ray's store included."""
        self.over = threading.Event()
        self._thread: threading.Thread | None = None

    def on_start(self, started: Started) -> None:
        pids = {int(facts.place.split()[1]) for facts in started.nodes}
        self._thread = threading.Thread(target=self._sample, args=(sorted(pids),), daemon=True)
        self._thread.start()

    def on_round(self, record: RoundRecord) -> None:
        print(f"  {self._label}: round {record.round}, {record.seconds:.1f} s")

    def _sample(self, pids: Sequence[int]) -> None:
        while not self.over.is_set():
            for pid in pids:
                try:
                    status = Path(f"/proc/{pid}/status").read_text()
                except OSError:
                    continue
                for name, peaks in (("RssAnon:", self.peaks), ("VmRSS:", self.resident)):
                    peaks[pid] = max(peaks.get(pid, 0), int(status.split(name)[1].split()[0]) * 1024)
            time.sleep(0.01)


def main() -> list[Row]:
    config = parse(
        {
            "rounds": 4,
            "algorithm": {"name": "diloco", "inner_steps": 2},
            "task": {"name": "benchmarks.workloads:Vector", "size": SIZE},
            "optimizer": {"name": "sgd", "lr": 0.1},
            "evaluation": {"every_rounds": 0},
            "cluster": {"nodes": {"target": 2}},
            "tracking": "none",
        }
    )
    peaks = Peaks("memory")
    runtime = Cluster(config)
    try:
        Controller(config, runtime, peaks, run_id="benchmark", run_dir="").run()
    finally:
        peaks.over.set()
        runtime.close()
    one = 4 * SIZE
    parameters_and_gradient, state, committed, exchange, replaced, temporaries = 2, 2, 1, 1, 2, 2
    promised = (parameters_and_gradient + state + committed + exchange + replaced + temporaries) * one + 300 * MEGABYTE
    peak = max(peaks.peaks.values())
    what = f"Memory of a node, DiLoCo with {SIZE // 1_000_000} M parameters (SGD), peak"
    return [Row(what, peak / 1e9, promised / 1e9, "≤ the formula", peak <= promised, unit="GB")]


if __name__ == "__main__":
    for row in main():
        print(row)
