"""The node actor's remote calls: gathered from its parts, and answered with nothing done if they are late."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from starling.actors.remote.exchange_calls import ExchangeCalls
from starling.actors.remote.message_calls import MessageCalls
from starling.actors.remote.messages import DeliveredResult, Expected, Letter, Reply
from starling.actors.remote.node_actor import NodeActor, remote_class
from starling.actors.remote.program_calls import ProgramCalls
from starling.actors.remote.remote_calls import answering_for, group_of, remote_call
from starling.actors.remote.running_epoch import RunningEpoch
from starling.actors.remote.store_calls import StoreCalls
from starling.actors.wire.tickets import Stale
from starling.orchestrator.runtimes import cluster


class Lamp:
    """A part."""

    def __init__(self, watts: int) -> None:
        self.watts = watts

    @remote_call("compute")
    def shine(self, hours: int) -> int:
        """Return the energy."""
        return hours * self.watts

    def dim(self) -> None:
        """No remote call."""


def test_an_actor_answers_for_its_parts():
    @answering_for(Lamp)
    class Actor:
        def __init__(self) -> None:
            self.parts: dict[type, object] = {Lamp: Lamp(40)}

    actor: Any = Actor()
    assert actor.shine(2) == 80
    assert actor.shine.__doc__ == "Return the energy."
    assert group_of(Actor.shine) == "compute"  # pyright: ignore[reportAttributeAccessIssue]
    assert not hasattr(actor, "dim")


def test_two_parts_do_not_answer_to_one_name():
    class Torch:
        parts: dict[type, object] = {}

        @remote_call("control")
        def shine(self) -> None:
            """Do as a lamp."""

    with pytest.raises(TypeError, match="Torch answers 'shine' already, and Lamp does too"):
        answering_for(Lamp)(Torch)


def test_the_actor_answers_every_call_that_the_runtime_makes():
    made = set[str]()
    for path in Path(cluster.__file__).parent.glob("*.py"):
        made.update(re.findall(r"\bhandle\.(\w+)\b(?!\()", path.read_text(encoding="utf-8")))
    answered = {name for name, method in vars(NodeActor).items() if group_of(method) is not None}
    assert made == answered


def test_what_must_not_wait_for_a_program_has_threads_of_its_own():
    groups = {name: group_of(method) for name, method in vars(NodeActor).items()}
    assert {name for name, group in groups.items() if group == "watch"} == {"watch"}
    assert {name for name, group in groups.items() if group == "state"} == {"kept"}
    assert {groups[name] for name in ("ping", "cancel", "give_up", "post_late", "preempt", "usage")} == {"control"}
    assert {groups[name] for name in ("post", "secure", "deliver", "hold", "outbox")} == {"exchange"}
    assert {groups[name] for name in ("setup", "embody", "begin", "advance", "settle", "halt")} == {"compute"}


def test_ray_is_told_of_each_calls_thread():
    metadata: Any = remote_class().__ray_metadata__  # Ray has no public name for it
    groups = {name: group_of(method) for name, method in vars(NodeActor).items() if group_of(method) is not None}
    assert metadata.method_meta.concurrency_group_for_methods == groups


def test_what_belongs_to_an_older_attempt_is_answered_with_nothing_done():
    epoch = RunningEpoch(4)
    untouched: Any = None  # a host that fails whoever asks it
    store = StoreCalls(epoch)
    exchanges = ExchangeCalls(untouched, epoch, store)
    programs = ProgramCalls(untouched, epoch, store, exchanges)
    messages = MessageCalls(untouched, epoch, store, programs)
    stale = Reply([(1, Stale())])
    assert programs.run_on(3, [(1, None)]) == stale
    assert programs.advance(3, 0, [1], DeliveredResult(None, {})) == stale
    expected = Expected(seq=0, nodes=(1,), num_parts=2, parts=(1,))
    assert programs.advance(3, 0, [1], DeliveredResult(None, {}), expected) == [stale, None]
    programs.cancel(3, [1])
    assert messages.receive(3, 1, Letter(0, 0, 0, (), None, ())) == stale
    assert exchanges.post(3, 0, [1, 2], [0]) == [False, None, None]
    assert exchanges.post_late(3, 0, 1, 0) is None
    assert exchanges.secure(3, [untouched]) == [([], 0), None]
    assert exchanges.deliver(3, 0, {}, [], None) == (frozenset(), 0)
