"""Build data and replicas from plain configuration, alike in every process of a run."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from starling.actors.data import Epoch, Place, assign, files
from starling.actors.data.fingerprint import fingerprint
from starling.actors.data.generators import seeded
from starling.actors.replica.node_data import DataSource
from starling.actors.replica.pace import Pace
from starling.actors.replica.replica import Replica
from starling.actors.tasks import answers
from starling.actors.tasks.federated import FederatedSamples
from starling.algorithms.api import SERVER
from starling.algorithms.errors import DataError
from starling.algorithms.seeds import derive_seed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starling.actors.data import DataConfig, Indices, Sampler
    from starling.actors.data.fingerprint import Fingerprint
    from starling.actors.host.recorded_clock import Times
    from starling.actors.replica.spec import ReplicaSpec
    from starling.actors.tasks import Samples, Task
    from starling.actors.training.slab import Slab
    from starling.algorithms.api import NodeId


@dataclass(frozen=True)
class RunData:
    """A task's data, and their partition among the nodes."""

    train: Samples
    validation: Samples
    parts: Sequence[Indices]
    """Indices into ``train`` for each node."""
    sampler: Sampler = field(default_factory=Epoch)
    """Order in which a node draws its samples."""

    def fingerprint(self) -> Fingerprint:
        """Return the fingerprint that processes compare."""
        return fingerprint(None if isinstance(self.train, FederatedSamples) else self.train, self.validation)

    @property
    def part_sizes(self) -> tuple[int, ...] | None:
        """Samples of each part, if others may draw it while its node is away.

        ``None``: data that stay with their owner, or a law other than each sample once per epoch.
        """
        # Of a class derived from it an epoch may be anything.
        is_epoch = type(self.sampler) is Epoch
        if not is_epoch or isinstance(self.train, FederatedSamples) or self.train.owners is not None:
            return None
        return tuple(map(len, self.parts))

    def pace(self, spec: ReplicaSpec) -> Pace | None:
        """Return the run's pace; ``None`` with federated data, where each node has a pace of its own."""
        if isinstance(self.train, FederatedSamples):
            return None
        return Pace.of(spec, [len(part) for part in self.parts], len(self.parts))


def load_data(task: Task, data: DataConfig, num_nodes: int, seed: int) -> RunData:
    """Load and divide the data; deterministic, so that all processes agree without a word.

    Federated data are only looked at where ``parts`` is asked for those of a node.

    Raises:
        DataError: it cannot be read, or not be divided among ``num_nodes`` nodes.
    """
    files.forget()
    federated = FederatedSamples(task, num_nodes, seed) if data.source == "federated" else None
    train: Samples
    if federated is None:
        with _seeded_for(seed, "train_samples"):
            train = answers.samples(task, "train_samples", task.train_samples(num_nodes))
    else:
        train = federated
    with _seeded_for(seed, "validation_samples"):
        validation = answers.samples(task, "validation_samples", task.validation_samples(num_nodes))
    if not len(validation):
        message = f"task {task.name}: there are no held-out samples to evaluate on"
        raise DataError(message)
    if federated is None:
        with _seeded_for(seed, "partition"):
            parts = assign(train, data.partition, num_nodes, seed)
    else:
        parts = federated.parts
    return RunData(train, validation, parts, data.sampler)


def _seeded_for(seed: int, purpose: str) -> contextlib.AbstractContextManager[None]:
    """Seed the process's generators for code that draws from them, alike in all processes."""
    return seeded(derive_seed(seed, purpose), torch.device("cpu"))


def build_replicas(
    nodes: Sequence[NodeId],
    spec: ReplicaSpec,
    data: RunData,
    devices: Sequence[torch.device],
    times: Times | None = None,
    incarnation: int = 0,
) -> list[Replica]:
    """Build the replicas of one process, in their initial state; replicas on one device share a workbench.

    Args:
        nodes: their ids; ``SERVER`` among them gets no data.
        spec: what all of them have in common.
        data: of the run.
        devices: one for each node.
        times: through which programs see the clock; default: this machine's clock.
        incarnation: counts the processes that have embodied the nodes.
    """
    places: dict[torch.device, list[int]] = {}
    for place, device in enumerate(devices):
        places.setdefault(device, []).append(place)
    rows: dict[int, tuple[Slab, int]] = {}
    for device, here in places.items():
        slab = spec.slab(device, len(here))
        rows |= {place: (slab, row) for row, place in enumerate(here)}
    nobodys: Indices = torch.empty(0, dtype=torch.int64)
    is_planned, pace = data.part_sizes is not None, data.pace(spec)
    replicas: list[Replica] = []
    for place, node in enumerate(nodes):
        # Nodes beyond the parts have none: they are handed what others leave, or, where a part is nobody's but its
        # node's, read what others read, each in an order of its own.
        indices = nobodys if node == SERVER else data.parts[node % len(data.parts)]
        own = pace or Pace.of(spec, [len(indices)], len(data.parts))
        source = DataSource(data.train, indices, data.sampler, data.parts, data.validation)
        clock = time.monotonic if times is None else times.clock_of(node)
        replica = Replica(node, spec, source, row=rows[place], pace=own, clock=clock, incarnation=incarnation)
        if node >= len(data.parts) and is_planned:
            replica.replan(Place())
        replicas.append(replica)
    return replicas
