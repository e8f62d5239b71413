"""Decides which nodes are started when. A policy: it returns decisions, and the loops act."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from starling.algorithms.api import NodeId

_FIRST_DELAY_S = 0.5
_MAX_CRASHES = 5


@dataclass(frozen=True)
class Launch:
    """Start ``nodes``, each in the place of the process that it had, if it had one."""

    nodes: tuple[NodeId, ...]


@dataclass(frozen=True)
class StandBy:
    """Start ``count`` processes that wait for a place to take."""

    count: int


Decision: TypeAlias = Launch | StandBy


@dataclass
class _Crashes:
    """Failures of a node, or of spares."""

    count: int = 0
    """Failures since it last committed a round, or came up."""
    due: float | None = None
    """Time of its next start; None: it is being started, or never is."""

    def again(self, now: float) -> bool:
        """Count a failure; return whether another start follows: at once the first time, then after growing pauses."""
        self.count += 1
        delay = 0.0 if self.count == 1 else _FIRST_DELAY_S * 2 ** (self.count - 2)
        given_up = self.count > _MAX_CRASHES
        self.due = None if given_up else now + delay
        return not given_up


class Pool:
    """Keeps the wanted nodes going, and spares beside them.

    A node that dies again and again without committing a round between is given up. Something is wrong with its
    machine, its data or the program, and further attempts would hide it.

    Args:
        nodes: that the run begins with, or is starting to.
        most: how many there may be.
        auto: as many nodes are wanted as there is room for.
        per_process: nodes that share a process.
        warm_spares: processes that are to stand by.
    """

    def __init__(
        self, nodes: Iterable[NodeId], *, most: int, auto: bool = False, per_process: int = 1, warm_spares: int = 0
    ) -> None:
        self._wanted = set(nodes)
        self._most, self._auto, self._per_process = most, auto, per_process
        self._starting: set[NodeId] = set()
        self._crashes: dict[NodeId, _Crashes] = {}
        self._places = 0
        self._warm_spares = warm_spares
        self._spares = _Crashes(due=0.0)

    # --- what has happened -------------------------------------------------------------------------------------------

    def want(self, node: NodeId, now: float) -> None:
        """Want ``node`` from now on."""
        self._wanted.add(node)
        self._crashes[node] = _Crashes(due=now)

    def starting(self, nodes: Iterable[NodeId]) -> None:
        """Book that ``nodes`` are being started already."""
        self._starting.update(nodes)

    def up(self, node: NodeId) -> None:
        """Book that ``node`` is up."""
        self._starting.discard(node)

    def lost(self, node: NodeId, now: float) -> bool:
        """Book that ``node`` has died; return whether it is started again."""
        if node in self._starting:
            return True  # who is to take its place is on the way
        return self._crashes.setdefault(node, _Crashes()).again(now)

    def failed(self, node: NodeId, now: float) -> bool:
        """Book that ``node`` was started and did not come up; return whether it is started again."""
        self._starting.discard(node)
        return self._crashes.setdefault(node, _Crashes()).again(now)

    def leaves(self, node: NodeId, now: float) -> None:
        """Start the successor of ``node``, which will be gone soon."""
        if node not in self._starting:
            self._crashes.setdefault(node, _Crashes()).due = now

    def spare_lost(self, now: float) -> bool:
        """Book that a spare has died; return whether another is started."""
        return self._spares.again(now)

    def room(self, places: int) -> None:
        """Book that there is room for ``places`` more processes."""
        self._places = places

    def committed(self, nodes: Iterable[NodeId]) -> None:
        """Forgive ``nodes``, which have committed a round, their earlier failures."""
        for node in nodes if self._crashes else ():
            known = self._crashes.get(node)
            if known is not None and known.due is None:
                del self._crashes[node]

    # --- what is to be done ------------------------------------------------------------------------------------------

    def decide(self, now: float, num_spares: int) -> list[Decision]:
        """Return what is due at ``now``, each decision once, when ``num_spares`` processes stand by or will."""
        due = sorted(node for node, one in self._crashes.items() if one.due is not None and one.due <= now)
        for node in due:
            self._crashes[node].due = None
        due += self._grown()
        self._starting.update(due)
        decisions: list[Decision] = [Launch(tuple(due))] if due else []
        # Spares that are about to take a place no longer stand by.
        missing = self._warm_spares - max(0, num_spares - -(-len(due) // self._per_process))
        if missing > 0 and self._spares.due is not None and self._spares.due <= now:
            decisions.append(StandBy(missing))
        return decisions

    def _grown(self) -> list[NodeId]:
        """Return ids of new nodes, where there is room for them."""
        if not self._auto or not self._places:
            return []
        # Those that are being started will take places that are still counted as free.
        taken = -(-len(self._starting) // self._per_process)
        free = (self._places - taken) * self._per_process
        self._places = 0  # until it is counted again
        unused = (node for node in range(self._most) if node not in self._wanted)
        new = [node for node, _ in zip(unused, range(free), strict=False)]
        self._wanted.update(new)
        return new

    def comes(self, node: NodeId) -> bool:
        """Whether ``node`` is being started, or will be."""
        known = self._crashes.get(node)
        return node in self._starting or (known is not None and known.due is not None)

    @property
    def are_coming(self) -> bool:
        """Whether any node is being started, or will be."""
        return bool(self._starting) or any(map(self.comes, self._crashes))

    def next_due(self, num_spares: int = 0) -> float | None:
        """Return when ``decide`` is due again if nothing happens before; ``num_spares`` processes stand by."""
        waiting = [*self._crashes.values(), *([self._spares] if num_spares < self._warm_spares else [])]
        return min((one.due for one in waiting if one.due is not None), default=None)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Return the pool as plain data."""
        return {
            "wanted": sorted(self._wanted),
            "starting": sorted(self._starting),
            "crashes": {str(node): [one.count, one.due] for node, one in sorted(self._crashes.items())},
            "places": self._places,
            "spares": [self._spares.count, self._spares.due],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``to_json`` gave."""
        self._wanted, self._starting = set(state["wanted"]), set(state["starting"])
        self._crashes = {int(node): _Crashes(count, due) for node, (count, due) in state["crashes"].items()}
        self._places, self._spares = state["places"], _Crashes(*state["spares"])
