"""What a lost node costs those that survive it, how soon there are as many again, and what elasticity costs otherwise.

Four node actors on a Ray of our own, of which one after the other gets kill −9, in turn at each phase of a round: as it
begins to train, when its contribution is there, while contributions are reduced, and while results are delivered.

A *stall* is by how much longer it takes from one commit to the next, than without a loss in the same run: also what
happens between rounds counts. The task is a vector whose step takes no core, so that four nodes and the start of a
replacement do not fight for the two cores of a small machine in a way that no cluster knows.

What elasticity costs is measured on a training that takes all cores: the rounds of one run have it and lack it in
turns, in node processes (``workloads.Alternating``) and in the controller (``_Switchable``).
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

from benchmarks.harness import Row
from starling.orchestrator.config.schema import Config, parse
from starling.orchestrator.control.controller import Controller
from starling.orchestrator.control.members import Members
from starling.orchestrator.records.observers import Observer, RoundRecord
from starling.orchestrator.runtimes.cluster import session
from starling.orchestrator.runtimes.cluster.runtime import Cluster

NODES = 4
SIZE = 1_000_000
"""float32 values: an exchange of four parts."""
PHASES = {"train": "training", "post": "has posted", "secure": "is reduced", "deliver": "is delivered"}
KILLS = 3
"""At each phase."""
WARM_UP = 5
BETWEEN = 24
"""Rounds from one loss to the next: longer than a new spare takes to come up."""
COLD = 40
"""The same without spares."""
_DISTURBED = 8
"""Rounds after a loss that are no measure of a calm one."""
PAIRS = 30
"""Of rounds with and without elasticity."""


class _Log(Observer):
    """Keeps what the controller records."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def on_event(self, event: Mapping[str, Any]) -> None:
        self.events.append(dict(event))

    def sought(self, what: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == what]


def _run(config: Config, observer: Observer) -> None:
    runtime = Cluster(config)
    try:
        Controller(config, runtime, observer, run_id="benchmark", run_dir="").run()
    finally:
        runtime.close()


# --- losses -----------------------------------------------------------------------------------------------------------


def _losses(phases: list[str], between: int, warm_spares: int) -> tuple[_Log, list[int]]:
    """A run in which a node is lost every ``between`` rounds, at ``phases`` in turn; and in which rounds."""
    numbers = [WARM_UP + between * (place + 1) for place in range(len(phases))]
    events = [
        {"kind": "kill", "node": place % NODES, "round": number, "phase": phase}
        for place, (number, phase) in enumerate(zip(numbers, phases, strict=True))
    ]
    log = _Log()
    config = parse(
        {
            "rounds": numbers[-1] + between,
            "algorithm": {"name": "diloco", "inner_steps": 2},
            "task": {"name": "benchmarks.workloads:Vector", "size": SIZE, "step_s": 0.1},
            "optimizer": {"name": "sgd", "lr": 0.1},
            "evaluation": {"every_rounds": 0},
            "cluster": {"nodes": {"target": NODES}, "num_cpus": 0.1, "warm_spares": warm_spares},
            "faults": {"events": events},
            "tracking": "none",
        }
    )
    _run(config, log)
    return log, numbers


def _seconds(log: _Log) -> dict[int, float]:
    """From each round's commit back to the one before."""
    at = {event["round"]: event["at_s"] for event in log.sought("commit")}
    return {number: at[number] - at[number - 1] for number in at if number}


def _missed(log: _Log, number: int, node: int) -> int:
    """Rounds that ``node``, lost in round ``number``, has not committed."""
    later = (event["committed"] for event in log.sought("commit") if event["round"] >= number)
    return sum(1 for _ in itertools.takewhile(lambda committed: node not in committed, later))


def _phases(log: _Log) -> dict[str, float]:
    """Medians of how long each phase of the recoveries took."""
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for event in log.sought("recovered"):
        for phase, value in event["seconds"].items():
            if value is not None:
                seconds[phase].append(value)
        seconds["total"].append(event["total_s"])
    return {phase: statistics.median(values) for phase, values in seconds.items()}


def losses() -> list[Row]:
    """With a spare that stands by, and without."""
    log, numbers = _losses([*PHASES] * KILLS, BETWEEN, warm_spares=1)
    seconds = _seconds(log)
    calm = statistics.median(
        value
        for number, value in seconds.items()
        if number > WARM_UP and not any(0 <= number - lost < _DISTURBED for lost in numbers)
    )
    rows: list[Row] = []
    for place, (phase, text) in enumerate(PHASES.items()):
        stalls = [seconds[number] - calm for number in numbers[place :: len(PHASES)]]
        print(f"  recovery: {phase}: stalls {' '.join(f'{one:.3f}' for one in stalls)} s, a round {calm:.3f} s")
        what = f"Stall of the survivors of kill −9 of one of {NODES} ({text}), over a round of {calm:.2f} s"
        stall = statistics.median(stalls)
        rows.append(Row(what, stall, None, "< 0.2 s", stall < 0.2))
    missed = [_missed(log, number, place % NODES) for place, number in enumerate(numbers)]
    print(f"  recovery: rounds missed {missed}")
    what = f"Rounds until there are {NODES} nodes again, with a warm spare, the most of {len(missed)} losses"
    rows.append(Row(what, max(missed), None, "≤ 2", max(missed) <= 2, unit=""))
    joins = [seconds[number + count] - calm for number, count in zip(numbers, missed, strict=True)]
    rows.append(Row("How much longer the round takes in which the spare joins", statistics.median(joins), None))
    cold, _ = _losses(["train"] * 2, COLD, warm_spares=0)
    for name, run in (("a warm spare", log), ("a new process", cold)):
        found = _phases(run)
        parts = ", ".join(f"{phase.replace('_', ' ')} {value:.2f}" for phase, value in found.items())
        print(f"  recovery: {name}: {parts}")
        named = ("detect", "replace", "import", "transfer", "first_commit")
        text = ", ".join(f"{phase.replace('_', ' ')} {found[phase]:.2f}" for phase in named)
        rows.append(Row(f"From kill −9 to the first commit of {name} ({text} s)", found["total"], None))
    return rows


# --- nothing is lost --------------------------------------------------------------------------------------------------


class _Switchable(Observer):
    """Lets the controller do without what it does for elasticity in every other round."""

    def __init__(self) -> None:
        self.elastic = True
        self.seconds: list[float] = []

    def on_round(self, record: RoundRecord) -> None:
        self.seconds.append(record.seconds)
        self.elastic = record.round % 2 == 1  # the next one's

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        act, machines = Members.act, session.machines

        def act_or_not(members: Members) -> bool:
            return act(members) if self.elastic else False

        def machines_or_not() -> session.Machines:
            if not self.elastic:
                raise RuntimeError("not asked")  # which is as much as an answer that tells nothing
            return machines()

        with mock.patch.object(Members, "act", act_or_not), mock.patch.object(session, "machines", machines_or_not):
            yield


def elasticity() -> Row:
    """Rounds with and without, in pairs."""
    config = parse(
        {
            "rounds": 2 * (PAIRS + 2),
            "algorithm": {"name": "benchmarks.workloads:Alternating", "inner_steps": 10},
            "task": {"name": "text_lm", "model": {"layers": 2, "width": 128, "heads": 4}, "context": 64},
            "data": {"batch_size": 16},
            "optimizer": {"name": "adamw", "lr": 1e-3},
            "evaluation": {"every_rounds": 0, "max_batches": 1},
            "cluster": {"nodes": {"target": NODES}},
            "tracking": "none",
        }
    )
    observer = _Switchable()
    with observer.patched():
        _run(config, observer)
    seconds = observer.seconds[4:]
    with_, without = statistics.median(seconds[::2]), statistics.median(seconds[1::2])
    # A machine's moods last longer than two rounds: they are the same for both of a pair.
    ratio = statistics.median(one / other for one, other in zip(seconds[::2], seconds[1::2], strict=True))
    print(f"  recovery: elasticity: medians {with_:.4f} and {without:.4f} s, median of the pairs' ratios {ratio:.4f}")
    what = "A DiLoCo round of text_lm, 10 steps, with elasticity, against one without (median of pairs)"
    return Row(what, without * ratio, without, "≤ 1.03×", ratio <= 1.03)


def main() -> list[Row]:
    return [*losses(), elasticity()]


if __name__ == "__main__":
    for row in main():
        print(row)
