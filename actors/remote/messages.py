"""Messages between the controller and node actors: plain data."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from starling.actors.wire.tickets import Contributed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from starling.actors.wire.buffers import Buffer, TensorSpec
    from starling.actors.wire.tickets import Ticket
    from starling.algorithms.api import Layout, NodeId
    from starling.algorithms.registry import Part

Ref: TypeAlias = Any
"""A Ray ``ObjectRef``; this module does not import Ray."""


@dataclass(frozen=True)
class Setup:
    """Configuration of a process that hosts nodes, as plain data."""

    nodes: tuple[NodeId, ...]
    """Nodes of the process; empty for a spare, which stands by until ``embody`` names its nodes."""
    num_nodes: int
    """Number of nodes among which the data are divided."""
    algorithm: dict[str, Any]
    task: dict[str, Any]
    data: dict[str, Any]
    optimizer: dict[str, Any]
    seed: int
    rounds: int
    skip_nan: bool
    fetch_timeout_s: float
    drain_s: float
    """Seconds after SIGTERM at which the process ends by itself, if it has not ended before."""
    versions: dict[str, str]
    """Versions that must agree in all processes, by name."""
    average: dict[str, Any] | None = None
    """Running average of the models."""
    incarnation: int = 0
    sys_path: tuple[str, ...] = ()
    """The driver's module search path; folders that exist here are searched in its order."""
    parts: Mapping[str, type[Part]] = field(default_factory=dict)
    """Classes of the parts above that only the driver can import, as those of a script or a notebook."""


@dataclass(frozen=True)
class Ready:
    """Report of a process that is up."""

    place: str
    devices: dict[NodeId, str]
    gpus: tuple[str, ...]
    num_samples: dict[NodeId, int]
    layout: Layout
    baselines: dict[str, float]
    warnings: tuple[str, ...]
    pid: int
    part_sizes: tuple[int, ...] | None = None
    """Samples of each part, if others may draw it while its node is away."""
    fingerprint: dict[str, int | str] = field(default_factory=dict[str, "int | str"])
    """Fingerprint of the data that the process sees."""
    machine: str = ""
    """Ray's name of the process's machine."""
    import_s: float = 0.0
    """Seconds from the process's first line of our code to this report: imports, data, models."""


@dataclass(frozen=True)
class Expected:
    """Large contributions that a call is expected to return along with its reply, as in the last round."""

    seq: int
    nodes: tuple[NodeId, ...]
    num_parts: int
    parts: tuple[int, ...]
    """Parts of the contributions that other processes are to have."""

    @property
    def num_values(self) -> int:
        """Number of values that come with the reply."""
        return len(self.parts) * len(self.nodes)


@dataclass(frozen=True)
class Reply:
    """The latest tickets of a process's programs, and their log lines."""

    tickets: list[tuple[NodeId, Ticket]]
    logs: dict[NodeId, list[str]] = field(default_factory=dict)
    seen: dict[NodeId, list[float]] = field(default_factory=dict)
    """Times that programs saw, where results may depend on them."""
    posted: int | None = None
    """The exchange whose contributions come along, as was expected."""


@dataclass(frozen=True)
class SecureJob:
    """Fetch contributions, and measure or reduce one part of them (a gather: keep them)."""

    seq: int
    part: int
    by: NodeId
    generation: int
    specs: tuple[TensorSpec, ...] | None
    """Of an AllReduce; ``None`` keeps what is fetched."""
    weights: dict[NodeId, float]
    refs: dict[NodeId, Ref]
    """Contributions of members in other processes."""
    measured: Buffer | None = None
    """Sum of the measures of all parts, if the aggregator needs it."""


@dataclass(frozen=True)
class Inline:
    """A closed exchange whose contributions came with their announcements.

    One buffer and a few tuples: it is written once for each process and read once in each.
    """

    nodes: tuple[NodeId, ...]
    """Nodes whose contributions the process is to have."""
    weights: tuple[float, ...]
    forms: tuple[tuple[TensorSpec, ...], ...]
    """Distinct specs of the contributions."""
    form_of: tuple[int, ...]
    """Index into ``forms`` of each contribution."""
    ends: tuple[int, ...]
    """End of each contribution in ``data``, in bytes."""
    data: Buffer
    closed: tuple[NodeId, ...]
    """Nodes whose contributions are in the exchange, in this process or elsewhere."""

    @staticmethod
    def of(contributions: Sequence[Contributed], closed: tuple[NodeId, ...]) -> Inline:
        """Put contributions together."""
        forms = tuple(dict.fromkeys(one.specs for one in contributions))
        place = {specs: index for index, specs in enumerate(forms)}
        buffers = [one.data for one in contributions]
        return Inline(
            nodes=tuple(one.node for one in contributions),
            weights=tuple(one.weight for one in contributions),
            forms=forms,
            form_of=tuple(place[one.specs] for one in contributions),
            ends=tuple(itertools.accumulate(one.nbytes for one in buffers)),
            data=np.concatenate(buffers) if buffers else np.empty(0, dtype=np.uint8),
            closed=closed,
        )

    @property
    def contributions(self) -> list[Contributed]:
        """The contributions, as views of ``data``."""
        starts = (0, *self.ends)
        return [
            Contributed(node, weight, self.forms[form], self.data[start:end])
            for node, weight, form, start, end in zip(
                self.nodes, self.weights, self.form_of, starts, self.ends, strict=False
            )
        ]


@dataclass(frozen=True)
class DeliveredResult:
    """A closed exchange whose result was delivered before."""

    specs: tuple[TensorSpec, ...] | None
    weights: dict[NodeId, float]
    gathered: dict[NodeId, tuple[TensorSpec, ...]] = field(default_factory=dict)
    """Specs of each payload of a gather."""


@dataclass(frozen=True)
class Letter:
    """A message for a node."""

    sender: NodeId
    staleness: int
    round: int
    """The sender's round in which it sent."""
    specs: tuple[TensorSpec, ...]
    inline: Buffer | None
    ref: tuple[Ref, ...]
    """Reference of a large payload, else empty; in a container, so that Ray does not fetch the payload for us."""
