"""Plans of exchanges: signatures, cuts and neighbourhoods, worked out once for all nodes and rounds of a process."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from starling.actors.wire import buffers
from starling.actors.wire.batched_mixing import MixingMatrix
from starling.actors.wire.buffers import Cuts, Signature, TensorSpec
from starling.algorithms.api import AllGather, AllReduce, NeighborAllGather
from starling.algorithms.costs import num_parts

if TYPE_CHECKING:
    from starling.actors.host.programs import Collective
    from starling.actors.wire.tickets import Wants
    from starling.algorithms.api import NodeId
    from starling.algorithms.topologies import Mixing, Topology

_MAX_KEPT = 64


@dataclass(frozen=True)
class Form:
    """An operation without its contribution."""

    parts: tuple[object, ...]
    signature: Signature
    settings: Collective


class Neighborhoods:
    """In-neighbours of all nodes under one mixing matrix, in the forms that each round asks for."""

    def __init__(self, topology: Topology, mixing: Mixing) -> None:
        self.topology = topology
        self.mixing = mixing
        self._ordered: dict[NodeId, tuple[NodeId, ...]] = {}
        self._sets: dict[NodeId, Wants] = {}

    @functools.cached_property
    def rows(self) -> MixingMatrix:
        """The matrix, to be multiplied with all nodes' values."""
        return MixingMatrix(self.mixing.weights)

    def ordered(self, node: NodeId) -> tuple[NodeId, ...]:
        """Return the in-neighbours of ``node``, sorted."""
        if node not in self._ordered:
            self._ordered[node] = self.mixing.in_neighbors(node)
        return self._ordered[node]

    def of(self, node: NodeId) -> Wants:
        """Return the in-neighbours of ``node`` as a set, with their substitutes."""
        if node not in self._sets:
            self._sets[node] = frozenset(self.mixing.substitutes.get(node, self.ordered(node)))
        return self._sets[node]


class ExchangePlans:
    """Caches of everything about an exchange that does not depend on the contributed values.

    Args:
        seed: the run's, from which topologies draw.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.number = 0
        """The running round."""
        self.members: tuple[NodeId, ...] = ()
        """The running round's view, sorted."""
        self._cuts: dict[tuple[str, tuple[TensorSpec, ...], int], Cuts] = {}
        self._forms: dict[tuple[object, ...], Form] = {}
        self._last_form: Form | None = None
        """If the last operation was a neighbour gather: in a gossip round a thousand come one after the other."""
        self._neighborhoods: dict[int, Neighborhoods] = {}
        self._last_neighborhoods: Neighborhoods | None = None
        """Most graphs stay from round to round."""

    def begin(self, number: int, members: tuple[NodeId, ...]) -> None:
        """Enter round ``number`` of ``members``."""
        # Not to be read off a replica: who takes a dead node's place in mid-round is in no round, and has no view.
        self.number, self.members = number, members
        self._neighborhoods = {}

    def form(self, operation: Collective) -> Form:
        """Return the settings and the signature of an operation.

        Raises:
            ProgramError: it contributes what cannot travel.
        """
        last = self._last_form
        if last is not None and isinstance(operation, NeighborAllGather):
            parts = last.parts
            if parts[0] is operation.topology and parts[1] is operation.close:
                return last
        match operation:
            case AllReduce(tensors, _, aggregator, codec, result_codec, close):
                parts = aggregator, codec, result_codec, close
                specs = None if tensors is None else buffers.described(tensors)[0]
            case AllGather(_, close):
                parts, specs = (close,), None
            case NeighborAllGather(_, topology, close):
                parts, specs = (topology, close), None
        key = type(operation), specs, *map(id, parts)
        known = self._forms.get(key)
        # An id is another's once its object is gone.
        if known is None or any(one is not other for one, other in zip(known.parts, parts, strict=True)):
            if len(self._forms) >= _MAX_KEPT:
                self._forms.clear()
            # Of an AllReduce the settings are needed to the end, the tensors until they are delivered.
            nothing = {"tensors": None} if isinstance(operation, AllReduce) else {"payload": None}
            settings = replace(operation, **nothing)
            known = self._forms[key] = Form(parts, buffers.signature_of(operation), settings)
        self._last_form = known if isinstance(operation, NeighborAllGather) else None
        return known

    def neighborhoods(self, seq: int, topology: Topology) -> Neighborhoods:
        """Return the in-neighbours of all members in exchange ``seq`` of this round's view."""
        known = self._neighborhoods.get(seq)
        if known is None or known.topology is not topology:
            mixing = topology.mixing(self.members, self.number, self._seed)
            last = self._last_neighborhoods
            known = last if last is not None and last.mixing is mixing else Neighborhoods(topology, mixing)
            self._neighborhoods[seq] = self._last_neighborhoods = known
        return known

    def mixing(self, neighborhoods: Neighborhoods, closed: frozenset[NodeId]) -> Mixing:
        """Return the mixing matrix among ``closed``, the members whose contributions are in."""
        if len(closed) == len(self.members):
            return neighborhoods.mixing
        return neighborhoods.topology.mixing(self.members, self.number, self._seed, closed)

    def cuts(self, operation: AllReduce[Any], parts: str, specs: tuple[TensorSpec, ...]) -> Cuts:
        """Return the cuts of contributions to an ``AllReduce`` among this round's members.

        Args:
            operation: whose codecs encode them.
            parts: of its signature.
            specs: of the contributed tensors.
        """
        num_members = len(self.members)
        known = self._cuts.get((parts, specs, num_members))
        if known is None:
            whole = Cuts(specs, operation.codec, operation.result_codec, 1)
            parted = num_parts(sum(whole.part_nbytes), num_members)
            known = whole if parted == 1 else Cuts(specs, operation.codec, operation.result_codec, parted)
            if len(self._cuts) >= _MAX_KEPT:
                self._cuts.clear()
            self._cuts[parts, specs, num_members] = known
        return known
