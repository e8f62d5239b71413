"""The Ray runtime without Ray: a clock that is set, and actors whose calls are answered when a test says so."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from starling.orchestrator.runtimes.cluster.event_loop import EventLoop

if TYPE_CHECKING:
    from starling.algorithms.api import NodeId
    from starling.orchestrator.runtimes.cluster.actors import Actor, ActorPool


class Ref:
    """A reference to what a call returns."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._future: Future[Any] = Future()

    def future(self) -> Future[Any]:
        return self._future

    def __repr__(self) -> str:
        return self.name


class _Method:
    def __init__(self, fakes: Fakes, name: str) -> None:
        self._fakes, self._name, self._returns = fakes, name, 1

    def options(self, num_returns: int) -> _Method:
        self._returns = num_returns
        return self

    def remote(self, *arguments: Any) -> Any:
        self._fakes.asked.append((self._name, arguments))
        refs = [Ref(f"{self._name} {len(self._fakes.asked)} {place}") for place in range(self._returns)]
        self._fakes.waiting.setdefault(self._name, []).append(refs[0])
        return refs if self._returns > 1 else refs[0]


class _Handle:
    def __init__(self, fakes: Fakes) -> None:
        self._fakes = fakes

    def __getattr__(self, name: str) -> _Method:
        return _Method(self._fakes, name)


class Fakes:
    """All fake actors of a test, and the event loop under its clock."""

    def __init__(self) -> None:
        self.clock = 0.0
        self.loop = EventLoop(lambda: self.clock)
        self.asked: list[tuple[str, tuple[Any, ...]]] = []
        """Calls so far: the method's name, and the arguments."""
        self.waiting: dict[str, list[Ref]] = {}

    def add(self, pool: ActorPool, *nodes: NodeId, machine: str | None = None) -> Actor:
        """Add an actor that is up."""
        actor = pool.add(nodes, _Handle(self), 0)
        facts: Any = SimpleNamespace(
            machine=machine or f"machine {actor.index}",
            place=f"pid {actor.index}",
            pid=actor.index,
            devices=dict.fromkeys(nodes, "cpu"),
            num_samples=dict.fromkeys(nodes, 1),
            gpus=(),
            warnings=(),
        )
        actor.ready = facts
        return actor

    def answer(self, name: str, *results: Any) -> None:
        """Answer all calls of a method, in the order in which they were made; an exception is a call that fails."""
        for ref, result in zip(self.waiting.pop(name), results, strict=True):
            if isinstance(result, BaseException):
                ref.future().set_exception(result)
            else:
                ref.future().set_result(result)

    def at(self, clock: float) -> list[Any]:
        """Return what has happened by a moment."""
        self.clock = clock
        found: list[Any] = []
        while (happening := self.loop.next(clock)) is not None:
            found.append(happening)
        return found

    def calls(self, name: str) -> list[tuple[Any, ...]]:
        """Return the arguments of each call of a method."""
        return [arguments for asked, arguments in self.asked if asked == name]
