"""Each sample is committed exactly once per epoch, through any churn, in whole runs; and what is said of samples."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starling.orchestrator import api
from starling.orchestrator.config.schema import Config, parse
from starling.orchestrator.control import run_state
from starling.orchestrator.control.controller import Controller
from starling.orchestrator.control.samples import SampleProgress
from starling.orchestrator.errors import RunError, StarlingError
from starling.orchestrator.protocol.sample_ledger import DataLedger
from starling.orchestrator.records.observers import Observer, RoundRecord
from starling.orchestrator.runtimes.simulator import runtime as simulator
from starling.orchestrator.runtimes.simulator.runtime import Simulator
from tests import draws
from tests.control.test_membership_fuzz import PHASES, history
from tests.draws import expected, num_complete
from tests.toys import Ran, simulate

if TYPE_CHECKING:
    from collections.abc import Mapping


DRAWS, ALONE, NUMBERED = (f"{draws.__name__}:{name}" for name in ("Draws", "DrawsAlone", "Numbered"))


class Recorded(Ran):
    """Counts what is committed, by looking into the nodes at that moment."""

    runtime: Simulator
    controller: Controller

    def on_event(self, event: Mapping[str, Any]) -> None:
        super().on_event(event)
        if event["event"] == "commit":
            for node in event.get("committed", [event.get("node")]):
                self.count.update(self.runtime.host.replicas[node].local.get("drawn", []))

    @property
    def count(self) -> Counter[int]:
        return self.__dict__.setdefault("_count", Counter())

    @property
    def ledger(self) -> DataLedger:
        found = self.controller._state.samples.ledger
        assert found is not None
        return found


def record(num_parts: int | None = None, **keys: Any) -> Recorded:
    """Run a configuration in the simulator."""
    base = {"algorithm": DRAWS, "task": NUMBERED, "data": {"batch_size": 2}, "tracking": "none"}
    base |= {"network": {"start_s": 0.01, "latency_ms": 10}}
    config = parse(base | {"optimizer": {"name": "sgd", "lr": 0.1}} | keys)
    ran, runtime = Recorded(config), Simulator(config)
    runtime.num_parts = num_parts
    ran.runtime, ran.controller = runtime, Controller(config, runtime, ran, run_id="test", run_dir="test")
    try:
        ran.summary = ran.controller.run()
    except StarlingError as error:
        ran.summary, ran.error = ran.controller.summary("failed"), error
    finally:
        runtime.close()
    ran.replicas = runtime.host.replicas
    return ran


def check(ran: Recorded, num_samples: int = 40) -> int:
    """Exactly once; return the number of complete epochs."""
    assert isinstance(ran.error, RunError | None), ran.error
    assert ran.count == expected(ran.ledger, ran.config)
    complete = num_complete(ran.ledger)
    assert all(ran.count[number] >= complete for number in range(num_samples))
    assert ran.summary is not None
    samples = ran.summary.samples
    assert samples["committed"] == ran.count.total()
    assert samples["drawn"] == samples["committed"] + samples["redrawn"]
    assert samples["lost"] == 0
    return complete


def cluster(target: int = 4, **keys: Any) -> dict[str, Any]:
    return {"nodes": {"min": 1, "target": target}, "min_nodes_timeout_s": 60, **keys}


def kills(node: int, *rounds: int, phase: str = "train") -> list[dict[str, Any]]:
    return [{"kind": "kill", "node": node, "round": number, "phase": phase} for number in rounds]


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("phase", ["train", "post", "secure", "deliver", "commit"])
def test_a_node_that_dies_and_is_replaced(phase: str, large: bool):
    events = kills(2, 1, 4, 6, phase=phase)
    algorithm = {"name": DRAWS, "large": large}
    ran = record(rounds=12, algorithm=algorithm, cluster=cluster(), faults={"events": events})
    assert ran.error is None
    assert check(ran) >= 4


def test_a_node_that_is_given_up():
    """After five crashes without a commit between nobody starts it again: the others draw its part, epoch by epoch."""
    network = {"start_s": 0.01, "latency_ms": 500}  # rounds take longer than the pauses between its starts
    ran = record(rounds=60, cluster=cluster(), faults={"events": kills(1, *range(1, 60))}, network=network)
    assert ran.error is None
    assert any("too often" in line for line in ran.logs)
    assert check(ran) >= 5
    assert ran.sought("plan")


def test_nodes_that_come_late():
    """Until node 3 comes the others draw its part when they have finished theirs; it takes up what they have left."""
    events = [{"kind": "late_join", "node": node, "round": 9} for node in (2, 3)]
    ran = record(rounds=20, cluster=cluster(), faults={"events": events})
    assert ran.error is None
    assert check(ran) >= 5
    own = [event for event in ran.sought("plan") if event["node"] == 3]
    assert own[0]["position"][0] > 0


def test_nodes_that_leave_on_notice():
    events = [{"kind": "preempt", "node": node, "round": 2 + node} for node in range(4)]
    ran = record(rounds=12, cluster=cluster(drain_s=5), faults={"events": events})
    assert ran.error is None
    assert ran.summary is not None
    assert ran.summary.nodes["drained"] == 4
    assert check(ran) >= 4


@pytest.mark.parametrize("algorithm", [DRAWS, ALONE])
def test_nodes_beyond_the_parts(algorithm: str):
    """As ``target: auto`` has them: the data are divided among fewer nodes than there are by and by."""
    events = [{"kind": "late_join", "node": node, "round": 3} for node in (2, 3)]
    ran = record(2, algorithm=algorithm, rounds=30, cluster=cluster(), faults={"events": events})
    assert ran.error is None
    assert check(ran) >= 5
    assert {event["node"] for event in ran.sought("plan")} >= {2, 3}
    mine = [event for event in ran.sought("plan") if event["node"] == 3]
    assert mine[0]["extras"]


def test_a_node_with_nothing_to_draw_takes_empty_batches():
    ran = record(1, rounds=12, cluster=cluster(8), task={"name": NUMBERED, "num_samples": 5})
    assert ran.error is None
    assert check(ran, 5) >= 2


def test_training_on_nothing_takes_no_gradient():
    """``Train`` too, alone and batched over nodes, and what weighs by samples."""
    for algorithm in ({"name": "fedavg", "steps": 3}, {"name": "diloco", "inner_steps": 3}):
        keys = {"task": {"name": "digits"}, "data": {"batch_size": 400}, "rounds": 4}
        ran = record(1, algorithm=algorithm, cluster=cluster(6), **keys)
        assert ran.error is None
        assert ran.summary is not None
        assert ran.ledger.position(0).epoch >= 2


def test_rows_of_parquet_files(tmp_path: Path):
    """Ranges of an order that goes by row groups; whoever is handed one reads the row groups that it is in."""
    table = pa.table({"x": np.arange(200.0), "y": np.arange(200.0)})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=9)
    task = {"name": "parquet", "path": str(tmp_path / "rows.parquet"), "label": "y"}
    events = [*kills(1, *range(1, 40)), {"kind": "late_join", "node": 3, "round": 20}]
    network = {"start_s": 0.01, "latency_ms": 500}
    keys = {"data": {"batch_size": 5}, "evaluation": {"every_rounds": 0}, "network": network}
    ran = record(rounds=40, cluster=cluster(), task=task, faults={"events": events}, **keys)
    assert ran.error is None
    assert ran.sought("plan")
    assert ran.count == expected(ran.ledger, ran.config)
    complete = num_complete(ran.ledger)
    assert complete >= 2
    assert len(ran.count) > 150
    assert min(ran.count.values()) >= complete


def test_without_churn_nobody_is_handed_anything():
    ran = record(rounds=15, cluster=cluster())
    assert not ran.sought("plan")
    assert check(ran) == 9
    assert ran.rounds[-1].samples == ran.summary.samples if ran.summary else False


# --- whatever happens -------------------------------------------------------------------------------------------------


def churn(rng: random.Random, phases: tuple[str, ...]) -> dict[str, Any]:
    keys = history(rng, phases)
    return keys | {"data": {"batch_size": rng.choice([1, 2, 3, 7])}, "seed": rng.randrange(100)}


@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=30)
def test_any_synchronous_history(seed: int, large: bool):
    rng = random.Random(seed)
    keys = churn(rng, PHASES)
    nodes = keys["cluster"]["nodes"]["target"]
    check(record(rng.choice([None, 1, nodes + 2]), algorithm={"name": DRAWS, "large": large}, **keys))


@given(st.integers(0, 10**6))
@settings(max_examples=30)
def test_any_asynchronous_history(seed: int):
    rng = random.Random(seed)
    keys = churn(rng, ("train", "commit", "transfer"))
    nodes = keys["cluster"]["nodes"]["target"]
    check(record(rng.choice([None, 1, nodes + 2]), algorithm=ALONE, **keys))


# --- data that stay where they are, and other laws --------------------------------------------------------------------


def test_what_a_node_owns_is_drawn_by_nobody_else_and_is_lost_with_it():
    task = {"name": NUMBERED, "owned": True}
    ran = record(rounds=16, task=task, cluster=cluster(), faults={"events": kills(1, *range(1, 16))})
    assert ran.error is None
    assert not ran.sought("plan")
    # Two batches of a round: 0 to 5 were committed in round 0, of ten; the others have completed nine epochs and more.
    own = sum(ran.count[number] for number in range(40) if number % 4 == 1)
    others = min(ran.count[number] for number in range(40) if number % 4 != 1)
    assert ran.summary is not None
    assert others > 5
    assert own == 6
    assert ran.summary.samples["lost"] == 10 * others - 6


@pytest.mark.parametrize("law", ["replacement", "poisson"])
def test_draws_of_other_laws_are_logged(law: str):
    ran = record(rounds=6, cluster=cluster(2), data={"batch_size": 4, "sampler": law}, faults={"events": kills(1, 2)})
    assert ran.error is None
    assert not ran.sought("plan")
    logged = ran.sought("draws")
    assert [event["round"] for event in logged] == list(range(6))
    assert all(event["law"] == law for event in logged)
    assert sum(samples for event in logged for _, _, samples in event["nodes"].values()) == ran.count.total()
    epoch, offset, _ = logged[0]["nodes"][0]
    assert (epoch, offset) == (0, 3 if law == "poisson" else 12)


# --- what is counted --------------------------------------------------------------------------------------------------


def test_samples_of_rounds_that_are_given_up_count_as_redrawn():
    """All but one die in round 1, which is given up: whoever is left has drawn in vain, and draws the same again."""
    events = [event for node in (1, 2) for event in kills(node, 1, phase="post")]
    ran = record(rounds=4, cluster=cluster(3), faults={"events": events})
    assert ran.error is None
    assert ran.sought("abort")
    assert ran.summary is not None
    assert ran.summary.samples["redrawn"] > 0
    check(ran)


def test_training_counts_batches_too():
    ran = simulate(algorithm="test_silent", rounds=3, data={"batch_size": 5}, nodes=2)
    assert ran.summary is not None
    assert ran.summary.samples == {"drawn": 30, "committed": 30, "redrawn": 0, "lost": 0}


# --- resumed runs -----------------------------------------------------------------------------------------------------


class Watched(Observer):
    """Counts what a run commits, by rounds of the run, and ends it after one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, last: int = 10**6) -> None:
        self.drawn: dict[int, Counter[int]] = {}
        self._last, self._at = last, -1
        watched = self

        class Kept(SampleProgress):
            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments)
                watched.samples = self

        class Seen(Simulator):
            def __init__(self, config: Config) -> None:
                super().__init__(config)
                watched.runtime, watched.config = self, config

        monkeypatch.setattr(run_state, "SampleProgress", Kept)
        monkeypatch.setattr(simulator, "Simulator", Seen)

    samples: SampleProgress
    runtime: Simulator
    config: Config

    def on_event(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "commit":
            for node in event["committed"]:
                count = self.drawn.setdefault(event["round"], Counter())
                count.update(self.runtime.host.replicas[node].local["drawn"])

    def on_round(self, record: RoundRecord) -> None:
        if record.round == self._last:
            raise RuntimeError


@pytest.mark.parametrize(("nodes", "events"), [(4, True), (4, False), (2, False), (7, True), (1, False)])
def test_a_resumed_run_goes_on_exactly(nodes: int, events: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With as many nodes with the same bits, and with another number still each sample exactly once per epoch."""
    faults = [*kills(1, *range(1, 12)), {"kind": "late_join", "node": 3, "round": 6}] if events else []
    config = {
        "algorithm": DRAWS,
        "task": NUMBERED,
        "tracking": "none",
        "rounds": 24,
        "data": {"batch_size": 2},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "cluster": cluster(),
        "faults": {"events": faults},
        "network": {"start_s": 0.01, "latency_ms": 10},
        "checkpoint": {"every_rounds": 4},
    }
    whole = api.simulate(config, run_dir=tmp_path / "whole")
    before = Watched(monkeypatch, last=13)
    with pytest.raises(RuntimeError):
        api.simulate(config, run_dir=tmp_path / "run", observers=[before])
    after = Watched(monkeypatch)
    overrides = [] if nodes == 4 else [f"cluster.nodes.target={nodes}"]
    summary = api.resume(tmp_path / "run", overrides, observers=[after])
    assert min(after.drawn) == 12
    count = sum((drawn for number, drawn in before.drawn.items() if number < 12), Counter[int]())
    count = sum(after.drawn.values(), count)
    ledger = after.samples.ledger
    assert ledger is not None
    assert count == expected(ledger, after.config)
    assert min(count[number] for number in range(40)) >= num_complete(ledger) >= 5
    assert summary.samples["committed"] == count.total()
    if nodes == 4:
        assert summary.digest == whole.digest
        assert summary.samples == whole.samples
