"""The parts of the Ray runtime one by one, on a clock of the tests, with actors that answer when they are told to."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import ray.exceptions

from starling.actors.host.round_order import RoundOrder
from starling.actors.remote.messages import Expected, Reply
from starling.actors.wire.buffers import Signature
from starling.actors.wire.tickets import Failed, Posted, Sending
from starling.algorithms.api import View
from starling.orchestrator.config.schema import Config, parse
from starling.orchestrator.errors import ClusterError, NodeFailedError, NodeGoneError, NodeLostError
from starling.orchestrator.protocol.events import Reached, Secure
from starling.orchestrator.protocol.mailboxes import Delivery, Envelope, Handover
from starling.orchestrator.runtimes.cluster import actors, models, monitors, placement, processes, start_up, store
from starling.orchestrator.runtimes.cluster.actors import Actor, ActorPool
from starling.orchestrator.runtimes.cluster.placement import Placement
from starling.orchestrator.runtimes.cluster.processes import ClusterProcesses
from starling.orchestrator.runtimes.cluster.runtime import Cluster
from starling.orchestrator.runtimes.cluster.start_up import StartUp
from starling.orchestrator.runtimes.decisions import carry_out
from starling.orchestrator.runtimes.events import (
    Arrived,
    Died,
    FinalModel,
    Halted,
    Kept,
    Loaded,
    Log,
    Notice,
    NotLoaded,
    NotUp,
    Retired,
    Room,
    SpareLost,
    Unreadable,
    Up,
    Used,
    Vanished,
)
from tests.fake_actors import Fakes, Ref


def config(**keys: Any) -> Config:
    return parse({"algorithm": "fedavg", "task": "digits", "tracking": "none"} | keys)


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors.ray, "wait", lambda refs, timeout: ([one for one in refs if one.future().done()], []))
    monkeypatch.setattr(store.ray, "nodes", list)


class Made(Fakes):
    """A cluster of three actors with one node each, and one that stands by."""

    def __init__(self, **keys: Any) -> None:
        super().__init__()
        self.cluster = Cluster(config(**keys), loop=self.loop)
        self.cluster.processes.begun = True
        for node in range(3):
            self.add(self.cluster.pool, node)

    def actor(self, node: int) -> Actor:
        return self.cluster.pool.home[node]


# --- the event loop ---------------------------------------------------------------------------------------------------


def test_timers_run_in_the_order_of_their_moments_and_before_what_is_reported_later():
    fakes, found = Fakes(), list[str]()
    fakes.loop.after(2.0, lambda: found.append("second"))
    fakes.loop.after(1.0, lambda: found.append("first"))
    fakes.loop.at(0.0, lambda: found.append("at once"))
    assert fakes.at(0.5) == []
    assert found == ["at once"]
    assert fakes.at(2.0) == []
    assert found == ["at once", "first", "second"]


def test_events_that_are_put_first_come_before_others_and_in_their_order():
    fakes = Fakes()
    fakes.loop.report(Halted(1))
    fakes.loop.report_first([Halted(2), Halted(3)])
    assert fakes.at(0.0) == [Halted(2), Halted(3), Halted(1)]


def test_a_call_ends_in_the_controllers_thread_with_its_result_or_its_error():
    fakes, found = Fakes(), list[object]()
    good, bad = Ref("good"), Ref("bad")
    for ref in (good, bad):
        fakes.loop.when_done(ref, found.append, lambda error: found.append(str(error)))  # pyright: ignore[reportArgumentType]
    good.future().set_result(1)
    bad.future().set_exception(ValueError("no"))
    assert found == []
    fakes.at(0.0)
    assert found == [1, "no"]


# --- the actor pool ---------------------------------------------------------------------------------------------------


def test_a_call_that_fails_means_a_loss_which_is_reported_once():
    made, failed = Made(), list[str]()
    actor = made.actor(1)
    for name in ("one", "two"):
        made.cluster.pool.call(actor, getattr(actor.handle, name).remote(), lambda *_: None, lambda: failed.append("!"))
    made.answer("one", ValueError("broken"))
    made.answer("two", ValueError("broken"))
    (died,) = made.at(0.0)
    assert isinstance(died, Died)
    assert died.node == 1
    assert failed == ["!", "!"]
    assert not actor.alive


def test_a_successor_hosts_a_node_as_soon_as_that_has_left():
    made = Made()
    before, after = made.actor(1), made.add(made.cluster.pool, 1)
    made.cluster.pool.came_up(after, 1)
    assert made.actor(1) is before
    made.cluster.retire([1], empty=[1])
    assert made.at(0.0) == [Retired(1, 0)]
    assert made.actor(1) is after
    assert not before.alive


def test_the_end_of_a_process_whose_nodes_have_left_is_no_loss():
    made = Made()
    actor = made.add(made.cluster.pool, 7, 8)
    made.cluster.retire([7], empty=[7])
    assert made.at(0.0) == [Retired(7, 0)]
    assert actor.alive, "node 8 is in it still"
    made.cluster.pool.lost(actor, ValueError("broken"))
    (died,) = made.at(0.0)
    assert isinstance(died, Died)
    assert died.node == 8


def test_a_process_that_stands_by_is_lost_as_a_spare():
    made = Made()
    spare = made.add(made.cluster.pool)
    assert made.cluster.processes.num_spares == 1
    made.cluster.pool.lost(spare, ValueError("broken"))
    (lost,) = made.at(0.0)
    assert isinstance(lost, SpareLost)
    assert made.cluster.processes.num_spares == 0


def test_an_actor_that_does_not_answer_within_its_limit_is_lost():
    made = Made()
    for node in (0, 1):
        made.cluster.pool.limit(made.actor(node), made.actor(node).handle.slow.remote(), 5.0, "it was slow")
    made.waiting["slow"][0].future().set_result(None)
    assert made.at(4.9) == []
    (died,) = made.at(5.1)
    assert (died.node, "it was slow" in died.reason) == (1, True)


# --- processes --------------------------------------------------------------------------------------------------------


def test_nodes_share_a_process_with_the_same_others_whenever_they_are_started():
    groups = Made(cluster={"nodes": {"target": 6}, "nodes_per_actor": 2}).cluster.processes.groups
    assert groups([0, 1, 2, 3]) == [(0, 1), (2, 3)]
    assert groups([3, 1, -1]) == [(3,), (1,), (-1,)]


def test_a_process_that_stands_by_takes_the_place_of_a_lost_one():
    made = Made()
    spare = made.add(made.cluster.pool)
    made.cluster.pool.lost(made.actor(1), ValueError("broken"))
    made.cluster.processes.launch([1])
    assert made.calls("embody") == [((1,), 0)]
    made.at(0.0)
    ready: Any = SimpleNamespace(
        **vars(made.actor(0).facts) | {"devices": {1: "cpu"}, "num_samples": {1: 5}, "fingerprint": {}, "import_s": 0.5}
    )
    made.answer("embody", ready)
    up, log = made.at(0.0)
    assert isinstance(up, Up)
    assert (up.facts.node, up.facts.num_samples, up.import_s) == (1, 5, 0.5)
    assert isinstance(log, Log)
    assert made.actor(1) is spare


def test_notice_is_given_once_and_ends_a_spare_at_once():
    made = Made()
    made.clock = 3.0
    for _ in range(2):
        made.cluster.processes.notice(made.actor(1), 10.0, "it is to go")
    assert made.at(3.0) == [Notice(1, 13.0, "it is to go")]
    made.cluster.processes.notice(made.add(made.cluster.pool), 10.0, "it is to go")
    assert made.at(3.0) == [SpareLost("it is to go")]


def test_who_does_not_answer_a_probe_in_time_is_lost():
    made = Made(cluster={"cancel_grace_s": 2})
    made.cluster.processes.probe([0, 1])
    made.waiting["ping"][0].future().set_result(True)
    assert made.at(1.9) == []
    (died,) = made.at(2.1)
    assert (died.node, died.reason) == (1, "it did not answer within 2 s (cluster.cancel_grace_s)")


def test_a_replacement_without_its_data_is_started_again_on_another_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(placement.session, "elsewhere", sorted)
    made, placed = Made(), list[object]()
    handles = SimpleNamespace(remote=lambda: made.actor(0).handle)
    options = SimpleNamespace(options=lambda **those: placed.append(those["scheduling_strategy"]) or handles)
    monkeypatch.setattr(processes, "remote_class", lambda: options)
    made.cluster.pool.lost(made.actor(1), ValueError("broken"))
    made.at(0.0)
    for machine in ("first", "second", "third"):
        made.cluster.processes.launch([1])
        made.answer("ping", machine)
        made.answer("setup", Failed("task parquet: path /data/site-1.parquet: there is no such file", None))
        (failed,) = made.at(0.0)
        assert isinstance(failed, NotUp)
        assert "no such file" in failed.reason
    assert placed == ["SPREAD", ["first"], ["first", "second"]]


class _Everywhere(Placement):
    def count(self, num_nodes: int) -> int:
        del num_nodes
        return 9


class _Lost(ClusterProcesses):
    """Node 0 takes long to start, and every process of node 1 is lost."""

    def __init__(self, fakes: Fakes, *parts: Any) -> None:
        super().__init__(*parts)
        self._fakes = fakes

    def start_actor(self, nodes: tuple[int, ...]) -> None:
        self.num_starts.update(nodes)
        actor = self._fakes.add(self._pool, *nodes)
        actor.ready = None
        if 1 in nodes:
            self._pool.lost(actor, ValueError("broken"))


def test_a_node_that_is_lost_while_it_starts_is_started_again_but_not_for_ever():
    fakes, one = Fakes(), config(cluster={"nodes": {"target": 2}})
    pool, places = ActorPool(fakes.loop, lambda _: None, lambda _: []), _Everywhere(one)
    started = _Lost(fakes, one, fakes.loop, pool, places)
    with pytest.raises(NodeLostError, match="node 1 was lost while it started, 3 times"):
        StartUp(one, fakes.loop, pool, places, started).run(None)
    assert started.num_starts == {0: 1, 1: 3}


def test_too_little_room_is_one_line_that_names_the_resource(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_Everywhere, "count", lambda *_: 1)
    monkeypatch.setattr(start_up.session, "brings_machines", lambda: False)
    monkeypatch.setattr(start_up.ray, "cluster_resources", lambda: {"CPU": 1.0})
    fakes, one = Fakes(), config(cluster={"nodes": {"target": 2, "min": 2}})
    pool, places = ActorPool(fakes.loop, lambda _: None, lambda _: []), _Everywhere(one)
    started = ClusterProcesses(one, fakes.loop, pool, places)
    with pytest.raises(ClusterError, match=r"2 nodes ask for 0.25 CPU each, the cluster has 1 \(ray status\)"):
        StartUp(one, fakes.loop, pool, places, started).run(None)


# --- programs and exchanges -------------------------------------------------------------------------------------------


def _posted(**changes: Any) -> Posted:
    sizes = (100_000,) * 3
    return Posted(0, Signature("AllReduce", "", None), (), 1.0, sizes, sizes, None, None)._replace(**changes)


def _begin(made: Made, epoch: int) -> None:
    made.cluster.programs.begin(RoundOrder(epoch, epoch, View(0, (0, 1, 2)), epoch - 1), (0, 1, 2))


def test_parts_are_put_into_the_store_before_a_contribution_is_announced():
    made = Made()
    _begin(made, 0)
    made.answer("begin", *(Reply([(node, _posted())]) for node in range(3)))
    assert made.at(0.0) == []
    # The part that its own process will reduce stays in its memory.
    assert [call[3] for call in made.calls("post")] == [(1, 2), (0, 2), (0, 1)]
    made.answer("post", True, True, True)
    assert made.at(0.0) == [Reached(node, _posted()) for node in range(3)]


def test_parts_come_along_with_the_reply_where_they_did_in_the_round_before():
    made = Made()
    _begin(made, 0)
    made.answer("begin", *(Reply([(node, _posted())]) for node in range(3)))
    made.at(0.0)
    _begin(made, 1)
    assert [call[2] for call in made.calls("begin")[3:]] == [
        Expected(0, (node,), 3, tuple({0, 1, 2} - {node})) for node in range(3)
    ]
    made.answer("begin", *(Reply([(node, _posted())], posted=0) for node in range(3)))
    assert [one.node for one in made.at(0.0)] == [0, 1, 2]
    assert len(made.calls("post")) == 3, "those of the first round"
    carry_out(made.cluster, [Secure(0, 0, 0, (0, 1, 2), 0)])
    ((_, (job,)),) = made.calls("secure")
    assert [str(ref)[:5] for ref in job.refs.values()] == ["begin", "begin"], "with the replies they came"


def test_what_an_older_attempt_is_answered_is_dropped():
    made = Made()
    _begin(made, 0)
    _begin(made, 1)
    made.waiting["begin"] = made.waiting["begin"][:3]
    made.answer("begin", *(Reply([(node, _posted(specs=None))]) for node in range(3)))
    assert made.at(0.0) == []


def test_a_program_that_does_not_stop_in_time_costs_its_process():
    made = Made(cluster={"cancel_grace_s": 2})
    made.cluster.programs.halt([0, 1])
    made.waiting["halt"][0].future().set_result([0])
    assert made.at(1.9) == [Halted(0)]
    (died,) = made.at(2.1)
    assert (died.node, died.reason) == (1, "it did not stop within 2 s (cluster.cancel_grace_s)")


def test_a_program_runs_on_when_it_has_sent_or_started_but_not_when_it_waits():
    made = Made()
    _begin(made, 0)
    sent = Sending(1, 5, (), 3, b"abc")  # pyright: ignore[reportArgumentType]
    tickets = sent, _posted(specs=None, waits=False), _posted(specs=None)
    made.answer("begin", *(Reply([(node, ticket)]) for node, ticket in enumerate(tickets)))
    made.at(0.0)
    assert [call[1] for call in made.calls("run_on")] == [[(0, None)], [(1, None)]]


# --- the state store --------------------------------------------------------------------------------------------------


def test_what_is_kept_lies_on_another_machine_if_there_is_one():
    made = Made()
    made.cluster.states.keep(2, 7)
    made.answer("export", 1000)
    assert made.at(0.0) == []
    made.answer("hold", True)
    assert made.at(0.0) == [Kept(2, 7, 1000)]
    assert made.cluster.states.restore(2)
    ((node, source, refs, position),) = made.calls("load")
    assert (node, source, position) == (2, 2, None)
    assert str(refs[0]).startswith("hold")
    made.cluster.states.release(2)
    assert not made.cluster.states.restore(2)


def test_what_is_kept_stays_where_it_is_if_no_other_machine_takes_it():
    made = Made()
    made.cluster.states.keep(2, 7)
    made.answer("export", 1000)
    made.at(0.0)
    made.answer("hold", ValueError("broken"))
    assert [type(one) for one in made.at(0.0)] == [Died, Kept]
    made.cluster.states.restore(2)
    assert str(made.calls("load")[0][2][0]).startswith("export")


def test_who_dies_while_its_state_is_copied_has_died_and_not_retired():
    made = Made()
    made.cluster.retire([1])
    made.cluster.pool.lost(made.actor(1), ValueError("broken"))
    made.answer("export", 1000)
    made.at(0.0)
    assert not made.cluster.states.restore(1)


def test_a_joiner_gives_up_on_a_donor_that_is_gone():
    made = Made()
    made.cluster.states.transfer(1, 0)
    made.cluster.pool.lost(made.actor(0), ValueError("broken"))
    assert made.calls("give_up") == [(None, 0)]
    made.answer("load", None)
    assert [type(one) for one in made.at(0.0)] == [Died, NotLoaded]


def test_who_is_given_up_is_lost_for_the_reason_that_was_told():
    made = Made()
    made.cluster.processes.give_up(1, "too slow")
    (died,) = made.at(0.0)
    assert (died.node, died.reason) == (1, "too slow")


def test_a_joiner_that_cannot_take_a_state_is_lost():
    made = Made()
    made.cluster.states.transfer(1, 0)
    made.cluster.states.transfer(2, 0)
    made.answer("load", Failed("of another run", None), 500)
    died, loaded = made.at(0.0)
    assert (died.node, died.reason) == (1, "of another run")
    assert loaded == Loaded(2, 0, 500)


def test_a_snapshot_asks_those_that_are_there_and_takes_what_was_kept_of_others():
    made = Made()
    made.cluster.retire([2])
    made.answer("export", 1000)
    made.at(0.0)
    made.answer("hold", True)
    made.at(0.0)
    made.cluster.states.snapshot([0, 1, 2], 0)
    assert made.calls("keep") == [([0], 0, 1), ([1], 0, 1)]
    assert made.calls("kept") == [(0, 1), (1, 1)]


# --- room in stores ---------------------------------------------------------------------------------------------------


def test_an_exchange_that_does_not_fit_ends_the_run_and_one_that_fitted_is_not_looked_at_again(
    monkeypatch: pytest.MonkeyPatch,
):
    asked: list[int] = []

    def nodes() -> list[dict[str, Any]]:
        asked.append(1)
        there = {"NodeManagerHostname": "b", "NodeManagerAddress": "10.0.0.2", "Alive": True}
        return [there | {"NodeID": "machine 1", "Resources": {"object_store_memory": 1_000_000}}]

    monkeypatch.setattr(store.ray, "nodes", nodes)
    made = Made()
    _begin(made, 0)
    made.answer("begin", *(Reply([(node, _posted())]) for node in range(3)))
    made.at(0.0)
    assert len(asked) == 1, "three announce the first exchange"
    made.cluster.exchanges.posted[0] = {node: _posted(part_nbytes=(9_000_000,) * 3) for node in range(3)}
    with pytest.raises(ClusterError, match=r"an exchange of 27\.0 MB from each of 3 nodes needs .* on b"):
        carry_out(made.cluster, [Secure(0, 0, 0, (0, 1, 2), 0)])
    asked.clear()
    sent = Sending(1, 5, (), 900_000, None)
    for _ in range(2):
        made.cluster.programs.on_reply(made.actor(1), Reply([(1, sent)]))
    assert len(asked) == 1
    with pytest.raises(ClusterError, match=r"a message of 2\.00 MB"):
        made.cluster.programs.on_reply(made.actor(1), Reply([(1, replace(sent, nbytes=2_000_000))]))


def test_a_process_that_fails_to_start_is_not_up():
    made = Made()
    actor = made.add(made.cluster.pool, 9)
    actor.ready = None
    made.cluster.processes.on_setup(actor, Failed("its torch is another", None))
    assert made.at(0.0) == [NotUp(9, "its torch is another")]


# --- messages ---------------------------------------------------------------------------------------------------------


def _message(made: Made, *, nbytes: int = 3, data: bytes | None = b"abc", letter: int = 5) -> Envelope:
    """Node 1 has sent a message to node 2."""
    sending: Any = Sending(2, letter, (), nbytes, data)  # pyright: ignore[reportArgumentType]
    made.cluster.programs.on_reply(made.actor(1), Reply([(1, sending)]))
    made.at(0.0)
    return Envelope(sender=1, round=0, number=0, to=2, nbytes=nbytes, letter=letter, heard=-1)


def test_a_small_message_is_there_at_once_and_travels_with_the_call():
    made = Made()
    envelope = _message(made)
    made.cluster.messages.dispatch(envelope)
    assert made.at(0.0) == [Arrived(envelope)]
    made.cluster.messages.hand_over(Handover(2, Delivery(envelope, staleness=0)))
    ((_, node, letter),) = made.calls("receive")
    assert (node, letter.sender, letter.inline, letter.ref) == (2, 1, b"abc", ())


def test_a_large_message_arrives_when_it_is_in_the_store_unless_its_sender_dies():
    made = Made()
    envelope = _message(made, nbytes=100_000, data=None)
    made.cluster.messages.dispatch(envelope)
    assert made.at(0.0) == []
    made.answer("outbox", True)
    assert made.at(0.0) == [Arrived(envelope)]
    other = _message(made, nbytes=100_000, data=None, letter=6)
    made.cluster.messages.dispatch(other)
    made.answer("outbox", ValueError("broken"))
    died, vanished = made.at(0.0)
    assert isinstance(died, Died)
    assert vanished == Vanished(other)


def test_a_payload_that_is_nowhere_to_be_had_leaves_its_receiver_waiting():
    made = Made()
    envelope = _message(made)
    made.cluster.messages.hand_over(Handover(2, Delivery(envelope, staleness=0)))
    made.answer("receive", None)
    assert made.at(0.0) == [Unreadable(2, envelope)]


@pytest.mark.parametrize(("algorithm", "keeps"), [("fedavg", False), ("random_walk", True)])
def test_delivered_payloads_are_kept_where_rounds_begin_again_one_by_one(algorithm: str, keeps: bool):
    made = Made(algorithm=algorithm)
    envelope = _message(made)
    for _ in range(1 + keeps):
        made.cluster.messages.hand_over(Handover(2, Delivery(envelope, staleness=0)))
    if not keeps:
        with pytest.raises(KeyError):
            made.cluster.messages.discard(1, 5)


def test_a_large_message_that_nobody_is_to_have_is_dropped_where_it_lies():
    made = Made()
    _message(made, nbytes=100_000, data=None)
    made.cluster.messages.discard(1, 5)
    assert made.calls("discard") == [(5,)]


# --- models -----------------------------------------------------------------------------------------------------------


def test_the_first_node_computes_the_metrics_and_the_others_give_their_models(monkeypatch: pytest.MonkeyPatch):
    made = Made()
    answers: dict[str, Any] = {"committed_model": True, "evaluate": {"loss": 0.5}, "model": ("digest", b"tensors")}
    monkeypatch.setattr(models.ray, "get", lambda ref, timeout: answers[ref.name.split()[0]])
    assert made.cluster.models.evaluate([2, 0], None) == {"loss": 0.5}
    ((node, others, *_),) = made.calls("evaluate")
    assert (node, len(others)) == (2, 1)
    assert made.cluster.models.fetch([1]) == FinalModel("digest", b"tensors")
    answers["evaluate"] = Failed("node 2, round 3: no", None)
    with pytest.raises(NodeFailedError, match="node 2, round 3: no"):
        made.cluster.models.evaluate([2], None)


def test_a_node_that_dies_while_it_is_asked_is_named_and_lost(monkeypatch: pytest.MonkeyPatch):
    def get(ref: Ref, timeout: float) -> Any:
        raise ray.exceptions.GetTimeoutError(f"{ref} in {timeout:g} s")

    made = Made()
    monkeypatch.setattr(models.ray, "get", get)
    with pytest.raises(NodeGoneError, match=r"node 1 \(pid 1\) was lost") as caught:
        made.cluster.models.evaluate([1], None)
    assert caught.value.node == 1
    assert [type(one) for one in made.at(0.0)] == [Died]


# --- monitors ---------------------------------------------------------------------------------------------------------


def test_machines_that_die_or_drain_take_their_nodes_along(monkeypatch: pytest.MonkeyPatch):
    reports: list[Any] = []
    monkeypatch.setattr(monitors.session, "MachineWatch", lambda report: reports.append(report) or SimpleNamespace())
    monkeypatch.setattr(monitors.store, "StoreWatch", lambda is_local: SimpleNamespace(local=is_local))
    monkeypatch.setattr(Placement, "count_free", lambda *_: 7)
    made = Made(cluster={"nodes": {"target": "auto", "min": 1, "max": 4}, "drain_s": 30})
    made.cluster._monitors.watch_run()
    dead, draining = frozenset({"machine 0"}), {"machine 1": None, "machine 2": 5.0}
    reports[0](SimpleNamespace(dead=dead, draining=draining))
    reason = "its machine is to be taken away (drain)"
    assert made.at(1.0) == [Died(0, "its machine is gone"), Notice(1, 31.0, reason), Notice(2, 6.0, reason), Room(7)]


def test_a_process_that_has_not_answered_is_not_asked_for_its_metrics_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(monitors.session, "MachineWatch", lambda _: SimpleNamespace())
    monkeypatch.setattr(monitors.store, "StoreWatch", lambda is_local: SimpleNamespace(local=is_local))
    made = Made()
    made.cluster._monitors.watch_run()
    assert made.at(2.0) == []
    for ref in made.waiting["usage"][:2]:
        ref.future().set_result({"cpu": 0.5})
    assert made.at(3.0) == [Used(0, {"cpu": 0.5}), Used(1, {"cpu": 0.5})]
    made.at(12.5)
    assert len(made.calls("usage")) == 3 + 2
