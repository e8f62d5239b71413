"""Whether exchanges fit into Ray's object stores: what is counted, what is refused, and what is said of full ones."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from starling.orchestrator.analysis import estimates
from starling.orchestrator.analysis.plan import make_plan
from starling.orchestrator.config.schema import parse
from starling.orchestrator.errors import ClusterError, ConfigError
from starling.orchestrator.runtimes import traffic
from starling.orchestrator.runtimes.cluster import ray_internals, store

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PARTS, RESULTS = [50, 70, 30, 90, 10], [5, 7, 3, 9, 1]


def one_by_one(
    parts: Sequence[int],
    results: Sequence[int],
    members: Sequence[int],
    givers: Sequence[int],
    homes: Mapping[int, tuple[str, int]],
) -> Counter[str]:
    """Every value by its name and the machine on which it lies."""
    lies: dict[tuple[object, ...], int] = {}
    for part, reducer in enumerate(members):
        for maker in givers:
            if homes[maker] == homes[reducer]:
                continue  # it never leaves their process
            for machine in (homes[maker][0], homes[reducer][0]):
                lies["part", maker, part, machine] = parts[part]
        for other in members:
            lies["result", part, homes[other][0]] = results[part]
    found: Counter[str] = Counter()
    for (*_, machine), nbytes in lies.items():
        found[str(machine)] += nbytes
    return found


@pytest.mark.parametrize(
    "places",
    [
        [("a", 0), ("a", 1), ("a", 2), ("a", 3), ("a", 4)],
        [("a", 0), ("b", 1), ("c", 2), ("d", 3), ("e", 4)],
        [("a", 0), ("a", 0), ("a", 0), ("a", 0), ("a", 0)],
        [("a", 0), ("a", 0), ("a", 1), ("b", 2), ("b", 2)],
        [("b", 7), ("a", 1), ("b", 3), ("a", 1), ("b", 3)],
    ],
    ids=["one machine", "a machine each", "one process", "pairs", "mixed"],
)
@pytest.mark.parametrize("givers", [[0, 2, 3, 5, 9], [2, 9], [5]], ids=str)
def test_an_average_is_counted_as_value_for_value(places: list[tuple[str, int]], givers: list[int]):
    members = [0, 2, 3, 5, 9]
    homes = dict(zip(members, places, strict=True))
    found = traffic.stored(PARTS, RESULTS, len(members), members, givers, homes.__getitem__)
    assert found == one_by_one(PARTS, RESULTS, members, givers, homes)


@pytest.mark.parametrize(
    ("most", "wanted"),
    [(4, {"a": 400, "b": 400}), (2, {"a": 400, "b": 300}), (1, {"a": 400, "b": 200}), (0, {"a": 300, "b": 100})],
)
def test_of_a_gather_a_machine_has_what_its_nodes_give_and_receive(most: int, wanted: dict[str, int]):
    homes = {0: ("a", 0), 1: ("a", 1), 2: ("a", 2), 3: ("b", 3)}
    assert traffic.stored([100], [], most, list(homes), list(homes), homes.__getitem__) == wanted


def machine(name: str, size: float, *, alive: bool = True) -> dict[str, Any]:
    host = {"NodeManagerHostname": f"host-{name}", "NodeManagerAddress": "10.0.0.1"}
    return {"NodeID": name, "Alive": alive, "Resources": {"object_store_memory": size} if size else {}} | host


def test_an_exchange_that_does_not_fit_is_one_line_that_says_what_to_set(monkeypatch: pytest.MonkeyPatch):
    machines = [machine("a", 80e6), machine("b", 1e9), machine("c", 0), machine("d", 1e6, alive=False)]
    monkeypatch.setattr(store.ray, "nodes", lambda: machines)
    store.check_room({"a": 80_000_000, "b": 90_000_000, "c": 1, "d": 2_000_000}, "an exchange", is_local=True)
    store.check_room({}, "an exchange", is_local=True)
    with pytest.raises(ClusterError) as caught:
        store.check_room({"a": 80_000_001, "b": 5}, "an exchange of 20.0 MB from each of 4 nodes", is_local=False)
    assert str(caught.value) == (
        "cluster: an exchange of 20.0 MB from each of 4 nodes needs 80.0 MB in Ray's object store on host-a "
        "(10.0.0.1), which has 80.0 MB; raise ray start --object-store-memory, have fewer nodes on that machine, or "
        "exchange less (a codec, a smaller model)"
    )
    with pytest.raises(ClusterError, match="; raise cluster.object_store_gb, have fewer"):
        store.check_room({"a": 90_000_000}, "an exchange", is_local=True)


def test_a_store_that_is_full_is_named_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    answers = itertools.chain([ConnectionError(), 500, 500, ConnectionError()], itertools.repeat(3_000_500))
    asked = threading.Event()

    def spilled(timeout_s: float) -> int:
        assert timeout_s > 0
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        if answer > 500:
            asked.set()
        return answer

    monkeypatch.setattr(ray_internals, "spilled_bytes", spilled)
    monkeypatch.setattr(store, "_PERIOD_S", 0.01)
    with caplog.at_level(logging.WARNING, "starling"):
        watch = store.StoreWatch(is_local=True)
        assert asked.wait(20)
        watch._thread.join(20)
        watch.stop()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("Ray's object store is full: 3.00 MB of it have been written to the disk")
    assert "cluster.object_store_gb" in line


def warnings(width: int, **cluster: Any) -> tuple[str, ...]:
    task = {"name": "digits", "model": {"name": "mlp", "width": width}}
    config = parse({"algorithm": "fedavg", "task": task, "cluster": {"nodes": {"target": 8}} | cluster})
    return estimates.store_warning(config, estimates.layout_of(config.replica_spec(), 1))


def test_check_warns_of_a_store_that_is_too_small(monkeypatch: pytest.MonkeyPatch):
    (line,) = warnings(40_000, object_store_gb=0.08)
    assert "in Ray's object store, which has 80.0 MB: raise cluster.object_store_gb" in line
    assert not warnings(40_000, object_store_gb=100)
    assert not warnings(40_000, object_store_gb=0.08, address="head:6379"), "how large its stores are is not known here"
    assert not warnings(10, object_store_gb=0.08), "small ones travel with the messages"
    monkeypatch.setattr(estimates, "default_store_bytes", lambda: 80_000_000)
    assert len(warnings(40_000)) == 1
    with pytest.raises(ConfigError, match="cluster.object_store_gb"):
        warnings(10, object_store_gb=0.07)


def test_a_plan_has_that_warning(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("starling.orchestrator.analysis.plan.store_warning", lambda *_: ("too small",))
    assert make_plan(parse({"algorithm": "fedavg", "task": "quadratic"})).warnings == ("too small",)
