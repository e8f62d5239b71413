"""What nodes hold at every begin and commit of a run, compared with what they must."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, cast

import torch

from starling.actors.replica.staged_state import leaves, same_bits
from tests.soak.programs import Mixer
from tests.toys import Ran

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from starling.actors.replica.replica import Replica
    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.control.controller import Controller
    from starling.orchestrator.records.round_log import Entry
    from tests.soak.processes import Directory, Spared

MAX_EVENTS = 40_000
MAX_VIRTUAL_S = 20_000.0


class Broken(AssertionError):  # noqa: N818 - not an error of this code's
    """Something that must hold does not."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


class Watched(Ran):
    """A run whose events are bounded, and whose spares die when it is said that they do."""

    runtime: Spared
    controller: Controller

    def __init__(self, config: Config, spares: Iterable[int] = ()) -> None:
        super().__init__(config)
        self.spares = Counter(spares)
        """In which rounds how many die."""
        self.directory: Directory | None = None
        """Where its rounds are written; most are not."""

    def on_event(self, event: Mapping[str, Any]) -> None:
        super().on_event(event)
        if event["event"] == self._told_by:
            for _ in range(self.spares.pop(event["round"], 0)):
                self.runtime.lose_spare()
        if len(self.events) > MAX_EVENTS or event["at_s"] > MAX_VIRTUAL_S:
            raise Broken("livelock", f"{len(self.events)} events, {event['at_s']} s; the last: {self.events[-5:]}")

    def on_sealed(self, entry: Entry) -> None:
        if self.directory is not None:
            self.directory.sealed(entry)

    def on_saving(self) -> Mapping[str, Any]:
        return {} if self.directory is None else self.directory.saving(len(self.rounds))

    @property
    def _told_by(self) -> str:
        return "begin" if self.config.algorithm.synchronous else "commit"

    @property
    def count(self) -> Counter[int]:
        """How often each sample was committed, by the word of the nodes."""
        return self.__dict__.setdefault("_count", Counter())

    @property
    def bodies(self) -> dict[int, Replica]:
        """Of each node the replica that the controller knows; another may have its place already."""
        return self.__dict__.setdefault("_bodies", {})

    @property
    def draws(self) -> bool:
        """Whether programs remember what they draw."""
        return any("drawn" in one.local for one in self.bodies.values())

    @property
    def has_momentum(self) -> bool:
        return bool(getattr(self.config.optimizer, "momentum", 0))

    def _embodied(self, event: Mapping[str, Any]) -> None:
        nodes = event["nodes"] if event["event"] == "start" else [event["node"]]
        self.bodies.update({node: self.runtime.host.replicas[node] for node in nodes})

    def _counted(self, nodes: Iterable[int]) -> None:
        for node in nodes:
            self.count.update(cast("list[int]", self.bodies[node].local.get("drawn", [])))


class Asynchronous(Watched):
    """Counts samples."""

    def on_event(self, event: Mapping[str, Any]) -> None:
        super().on_event(event)
        if event["event"] in {"start", "up"}:
            self._embodied(event)
        elif event["event"] == "commit":
            self._counted([event["node"]])


class Synchronous(Watched):
    """Compares models, shared and local states, and conserved sums."""

    def on_event(self, event: Mapping[str, Any]) -> None:
        super().on_event(event)
        kept = self._kept
        match event["event"]:
            case "start" | "up":
                self._embodied(event)
                for node in [event["node"]] if event["event"] == "up" else event["nodes"]:
                    kept.initial[node] = _committed_local(self.bodies[node])
                    kept.fresh.add(node)
                    if event["event"] == "start":
                        kept.models[node] = self.bodies[node].parameters.clone()
            case "lost":
                # What a predecessor handed over is kept until its successor has committed itself.
                if event["node"] not in kept.fresh:
                    kept.local.pop(event["node"], None)
            case "begin":
                self._begun(event, kept)
            case "commit":
                self._committed(event, kept)
                kept.fresh.difference_update(event["committed"])
            case _:
                pass

    @property
    def _kept(self) -> Kept:
        return self.__dict__.setdefault("_all_kept", Kept())

    def _begun(self, event: Mapping[str, Any], kept: Kept) -> None:
        """Before a round all have what was committed: the same, if they are replicas."""
        number, view = cast("int", event["round"]), event["view"]
        kept.begin = event
        bodies = {node: self.bodies[node] for node in view}
        self.runtime.states.settle(dict.fromkeys(view, number - 1))
        if isinstance(self.config.algorithm, Mixer):
            kept.before = {node: one.committed.double() for node, one in bodies.items()}
        if number == 0:
            return
        if self.config.algorithm.replicated:
            first = bodies[view[0]]
            for node, one in bodies.items():
                where = f"node {node} against {view[0]} at the begin of round {number}"
                if not torch.equal(one.committed_model()[0], first.committed_model()[0]):
                    raise Broken("models differ", where)
                if not same(one.shared.committed(), first.shared.committed()):
                    raise Broken("shared states differ", where)
        for node, one in bodies.items():
            where = f"of node {node} at the begin of round {number}"
            if not self.config.algorithm.steps_at_commit:
                mine, given = kept.models.get(node), [kept.models[other] for other in kept.last]
                if not any(known is not None and torch.equal(one.committed, known) for known in (mine, *given)):
                    raise Broken("parameters are nobody's", where)
            if not same(_committed_local(one), kept.local.get(node, kept.initial[node])):
                raise Broken("local state is not what it left", where)

    def _committed(self, event: Mapping[str, Any], kept: Kept) -> None:
        committed, number = event["committed"], event["round"]
        bodies = {node: self.bodies[node] for node in committed}
        algorithm = self.config.algorithm
        if algorithm.replicated and not algorithm.steps_at_commit:
            first = bodies[committed[0]]
            model = algorithm.model(first).clone()
            for node, one in bodies.items():
                where = f"node {node} against {committed[0]} in round {number}"
                if not torch.equal(algorithm.model(one), model):
                    raise Broken("models differ at a commit", where)
                if not same(dict(one.shared), dict(first.shared)):
                    raise Broken("shared states differ at a commit", where)
        self._counted(committed)
        self._conserved(event, kept)
        kept.last = tuple(committed)
        for node, one in bodies.items():
            kept.models[node] = one.parameters.clone()
            kept.local[node] = dict(one.local)

    def _conserved(self, event: Mapping[str, Any], kept: Kept) -> None:
        algorithm, committed = self.config.algorithm, event["committed"]
        closed = event["closed"]
        contributors = closed[max(closed)] if closed else ()
        is_whole = tuple(committed) == tuple(kept.begin["view"]) and set(contributors) <= set(committed)
        # A sum that was one at the begin is one at the end; at a change of the view it is made anew.
        is_sound = is_whole and (kept.is_sound or kept.begin["repair"] or event["round"] == 0)
        bodies = [self.bodies[node] for node in committed]
        match algorithm.name:
            case "gradient_tracking" if is_sound and set(contributors) == set(committed):
                corrections = [cast("Tensor", one.local["correction"]) for one in bodies]
                _check_zero("mean of corrections", torch.stack(corrections), event)
            case "scaffold" if is_sound:
                shared = cast("Tensor", bodies[0].shared["control"])
                zero = torch.zeros_like(shared)
                own = [cast("Tensor", one.local.get("control", zero)) for one in bodies]
                _check_zero("mean of control variates", torch.stack(own) - shared, event)
            case _ if isinstance(algorithm, Mixer):
                self._mixed(event, kept, algorithm)
        kept.is_sound = is_sound

    def _mixed(self, event: Mapping[str, Any], kept: Kept, mixer: Mixer) -> None:
        """Each has what the matrix makes of what all contributed, each 1 more than it had."""
        number, view, (closed,) = event["round"], kept.begin["view"], event["closed"].values()
        weights = mixer.topology.mixing(tuple(view), number, self.config.seed, frozenset(closed)).weights
        for node in event["committed"]:
            row = weights[node] if node in closed else {node: 1.0}
            mixed = sum((kept.before[other] + 1) * weight for other, weight in row.items())
            if not torch.allclose(self.bodies[node].parameters.double(), cast("Tensor", mixed), atol=1e-5):
                raise Broken("what is mixed is not what was contributed", f"node {node}, round {number}")


class Kept:
    """What is known of nodes."""

    def __init__(self) -> None:
        self.models: dict[int, Tensor] = {}
        """As last committed."""
        self.local: dict[int, Mapping[str, Any]] = {}
        """As last committed, of those that live or handed it over."""
        self.initial: dict[int, Mapping[str, Any]] = {}
        self.fresh: set[int] = set()
        """Have not committed a round since they came."""
        self.last: tuple[int, ...] = ()
        self.begin: Mapping[str, Any] = {}
        self.before: dict[int, Tensor] = {}
        """Parameters at the begin."""
        self.is_sound = False


def _committed_local(replica: Replica) -> dict[str, Any]:
    return replica.local.committed()


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two trees of state have the same bits."""
    return same_bits(dict(leaves(dict(one))), dict(leaves(dict(other))))


def _check_zero(what: str, values: Tensor, event: Mapping[str, Any]) -> None:
    """Rows add up to zero, but for rounding."""
    error, size = float(values.sum(0).abs().max()), float(values.abs().max())
    if not error <= 1e-4 * (size + 0.1):  # they may have been large before, and small now
        raise Broken(f"{what} is not conserved", f"{error} of {size} in round {event['round']}")
