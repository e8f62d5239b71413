"""The node actor: a process on a cluster that hosts one or several nodes.

A plain class that ``remote_class`` wraps (Ray's actor classes cannot be derived from). It owns parts, each with the
remote calls about one thing, which are its own calls too: ``handle.begin`` is ``ProgramCalls.begin``. Calls run in five
concurrency groups of one thread each. *compute* drives programs. *exchange* moves and reduces bytes, so that an
exchange proceeds while a program trains. *state* hands over what is saved. *control* is never behind any of these.
*watch* parks one call, whose failure tells the controller that the process is gone.

Calls carry the epoch that they belong to. Whatever belongs to an older one is answered with nothing done.
"""

from __future__ import annotations

import inspect
import time
from typing import TYPE_CHECKING, Any

import ray

from starling.actors.remote.exchange_calls import ExchangeCalls
from starling.actors.remote.message_calls import MessageCalls
from starling.actors.remote.model_calls import ModelCalls
from starling.actors.remote.node_builder import Built, NodeBuilder
from starling.actors.remote.process_calls import ProcessCalls
from starling.actors.remote.program_calls import ProgramCalls
from starling.actors.remote.remote_calls import GROUPS, answering_for, group_of, remote_call
from starling.actors.remote.running_epoch import RunningEpoch
from starling.actors.remote.state_calls import StateCalls
from starling.actors.remote.store_calls import StoreCalls
from starling.actors.wire.tickets import Failed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starling.actors.remote.messages import Ready, Setup
    from starling.algorithms.api import NodeId


@answering_for(ProcessCalls, StoreCalls, ExchangeCalls, ProgramCalls, MessageCalls, StateCalls, ModelCalls)
class NodeActor:
    """Hosts nodes in one process; see the module's docstring."""

    def __init__(self) -> None:
        # Ray runs this in the process's main thread.
        self._process = ProcessCalls()
        self._epoch = RunningEpoch()
        self._store = StoreCalls(self._epoch)
        self.parts: dict[type, object] = {ProcessCalls: self._process, StoreCalls: self._store}
        """The parts by class: those about nodes are there once there are nodes."""

    @remote_call("compute")
    def setup(self, setup: Setup) -> Ready | Failed:
        """Get ready, and build the replicas if there are to be any."""
        builder = NodeBuilder.prepare(setup)
        if isinstance(builder, Failed):
            return builder
        self._builder, self._drain_s = builder, setup.drain_s
        self._store.timeout_s = setup.fetch_timeout_s
        if setup.nodes:
            return self._hosted(builder.build(setup.nodes, setup.incarnation))
        self._process.drain_s = setup.drain_s
        return builder.ready()

    @remote_call("compute")
    def embody(self, nodes: Sequence[NodeId], incarnation: int) -> Ready | Failed:
        """Build the replicas of ``nodes``, in their initial state, in a process that stands by."""
        began = time.monotonic()  # it was there before it was needed
        return self._hosted(self._builder.build(nodes, incarnation, began))

    def _hosted(self, built: Built | Failed) -> Ready | Failed:
        """Answer calls for the nodes of a host from now on; return its report."""
        if isinstance(built, Failed):
            return built
        host, epoch, store = built.host, self._epoch, self._store
        exchanges = ExchangeCalls(host, epoch, store)
        programs = ProgramCalls(host, epoch, store, exchanges)
        messages = MessageCalls(host, epoch, store, programs)
        states = StateCalls(host, store)
        models = ModelCalls(host, self._builder.data.validation, store)
        self.parts |= {type(part): part for part in (exchanges, programs, messages, states, models)}
        self._process.drain_s = self._drain_s
        return built.report


def remote_class() -> Any:  # noqa: ANN401 - Ray's wrapper has no static type
    """Return ``NodeActor`` as a Ray actor class."""
    for method in vars(NodeActor).values():
        group = group_of(method)
        if group is not None:
            ray.method(concurrency_group=group)(inspect.unwrap(method))  # Ray looks behind wrappers
    wrap: Any = ray.remote  # its overloads do not know the argument
    return wrap(concurrency_groups=dict.fromkeys(GROUPS, 1))(NodeActor)
