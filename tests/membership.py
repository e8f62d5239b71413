"""Runs whose members change as a test says, and what their nodes hold after each round."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from starling.algorithms.api import View
from starling.orchestrator.config.schema import parse
from starling.orchestrator.control.controller import Controller
from starling.orchestrator.control.synchronous import Attempt, Synchronous
from starling.orchestrator.runtimes.simulator.runtime import Simulator
from tests.toys import Ran

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from starling.actors.replica.replica import Replica
    from starling.algorithms.api import NodeId
    from starling.orchestrator.control.run_state import RunState

    Views = Sequence[tuple[NodeId, ...]]
    Watch = Callable[[int, Mapping[NodeId, Replica]], None]


class _Scripted(Synchronous):
    """A node that is not in a round's view stands still; when it comes back it gets the state of a member."""

    def __init__(self, state: RunState, views: Views, watch: Watch, simulator: Simulator) -> None:
        super().__init__(state)
        self._views, self._watch, self._simulator = views, watch, simulator

    def _attempt(self, number: int) -> Attempt:
        attempt = super()._attempt(number)
        assert attempt.aborted is None
        self._runtime.states.settle(dict.fromkeys(self._state.members, number))
        self._watch(number, self._simulator.host.replicas)
        return attempt

    def _next_view(self) -> View:
        state, last = self._state, self._view
        members = self._views[state.committed + 1]
        joined = tuple(node for node in members if node not in state.members)
        left = tuple(node for node in last.members if node not in members)
        for node in joined:
            if last.members and node not in last.members:
                self._runtime.states.transfer(node, state.members[0])
        return View(last.number + bool(last.members and (joined or left)), members, joined, left)


class _ScriptedController(Controller):
    def __init__(self, *arguments: Any, views: Views, watch: Watch) -> None:
        config, simulator, observer = arguments
        super().__init__(config, simulator, observer, run_id="test", run_dir="test")
        self._script = views, watch, simulator

    def _loop(self) -> Synchronous:
        return _Scripted(self._state, *self._script)


def scripted(views: Views, watch: Watch, **keys: Any) -> Ran:
    """Run as many rounds as there are ``views``, each the sorted members of one.

    Args:
        views: the first one has all nodes that there are in the run, or the first few of them.
        watch: called after each round with its number and all replicas, those that are away too.
        keys: of the configuration.
    """
    base = {"tracking": "none", "evaluation": {"every_rounds": 0}, "rounds": len(views)}
    nodes = {"target": 1 + max(node for view in views for node in view)}
    cluster = {"quorum_fraction": 0.01} | keys.pop("cluster", {})
    config = parse(base | {"cluster": cluster | {"nodes": nodes}} | keys)
    ran = Ran(config)
    runtime = Simulator(config)
    try:
        ran.summary = _ScriptedController(config, runtime, ran, views=views, watch=watch).run()
    finally:
        runtime.close()
    ran.replicas = runtime.host.replicas
    return ran


def models(replicas: Mapping[NodeId, Replica]) -> Tensor:
    """Parameters of all nodes, shape (N, P), a copy."""
    return torch.stack([replicas[node].parameters.clone() for node in sorted(replicas)])
