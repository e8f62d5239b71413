"""Estimates before a run begins: memory on this machine, and the time of a simulation.

Both are estimates to be warned by. A model is laid out without being allocated, and one step of one node is timed.
"""

from __future__ import annotations

import contextlib
import re
import resource
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch

from starling.actors.data.generators import seeded
from starling.actors.training import shared_module
from starling.actors.training.shared_module import DTYPES
from starling.orchestrator.errors import ConfigError
from starling.orchestrator.runtimes.traffic import contribution_bytes, stored_bytes
from starling.orchestrator.units import bytes_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starling.actors.replica.spec import ReplicaSpec
    from starling.actors.tasks import Samples
    from starling.algorithms.api import Layout
    from starling.orchestrator.config.schema import Config

CHECK_BYTES = 2**30
"""Memory that a look at a configuration may take, unless it is given more."""
_ROOM = 8
"""A model is allocated, and a step timed, if so many copies of it fit: gradient, activations, what its build holds."""
_LONG_S = 3600.0
"""Longer simulations are worth a warning."""
_SHARE_OF_MEMORY, _SHARE_OF_SHARED, _LEAST_SHARED = 0.3, 0.95, 10**10
"""Ray's own, for its object store: of the memory that is free, and of ``/dev/shm``, if it has not less than this."""
_ASKED = re.compile(r"tried to allocate (\d+) bytes|Unable to allocate ([\d.]+ \w+)")


@dataclass(frozen=True)
class Estimate:
    """Memory and time of one node, and of a simulation in which all nodes share one process."""

    node_bytes: int
    """Parameters, their committed copy, gradient and optimizer state. The algorithm's own state comes on top."""
    simulation_bytes: int
    available_bytes: int
    """Free memory of this machine at the time of the estimate, in bytes."""
    step_s: float | None
    """Seconds of one batch on this machine; ``None``: not measured."""
    simulation_s: float | None
    """Seconds of all nodes' steps in sequence, without evaluation; ``None``: not measured, or unknown number."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """Lines about memory and time that are likely to surprise."""
        found: list[str] = []
        if self.simulation_bytes > self.available_bytes:
            wants, has = bytes_text(self.simulation_bytes), bytes_text(self.available_bytes)
            found.append(f"a simulation needs at least {wants} of memory, and this machine has {has} left")
        if self.simulation_s is not None and self.simulation_s > _LONG_S:
            found.append(f"a simulation takes some {span(self.simulation_s)} on this machine")
        return tuple(found)


def span(seconds: float) -> str:
    """Return ``seconds`` in words."""
    for unit, length in (("years", 365 * 86400.0), ("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.2g} seconds"


@contextlib.contextmanager
def bounded_memory(limit: int, hint: str) -> Iterator[None]:
    """Let this process take ``limit`` bytes more than it has, and no more.

    Raises:
        ConfigError: more was asked for; the error ends with ``hint``.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)
    allowed = psutil.Process().memory_info().vms + limit
    if before[1] != resource.RLIM_INFINITY:
        allowed = min(allowed, before[1])
    resource.setrlimit(resource.RLIMIT_AS, (allowed, before[1]))
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        resource.setrlimit(resource.RLIMIT_AS, before)
        asked = _ASKED.search(str(error))
        if not isinstance(error, MemoryError) and asked is None:
            raise
        amount = "" if asked is None else f" ({bytes_text(int(asked[1])) if asked[1] else asked[2]} at once)"
        what = f"task: its data and model need more memory than a check may take, {bytes_text(limit)}{amount}"
        raise ConfigError(f"{what}; {hint}") from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def layout_of(spec: ReplicaSpec, limit: int) -> Layout:
    """Return the layout of a run's model; one that takes a good part of ``limit`` bytes is not allocated.

    That takes a task which builds its model out of modules alone: their tensors can be made without values.
    """
    cpu = torch.device("cpu")
    try:
        with seeded(spec.seed, cpu), torch.device("meta"):
            found = shared_module.layout_of(spec.task.build(), DTYPES[spec.optimizer.precision])
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - whatever else a build does that tensors without values cannot
        return spec.bench(cpu).shared.layout
    return found if _ROOM * found.nbytes > limit else spec.bench(cpu).shared.layout


def estimate(
    spec: ReplicaSpec, layout: Layout, samples: Samples, num_nodes: int, steps: float | None, limit: int
) -> Estimate:
    """Return what a run takes; a step is timed if a node fits into ``limit`` bytes.

    Args:
        spec: of the run's replicas.
        layout: of its model.
        samples: to train on.
        num_nodes: how many share the process of a simulation.
        steps: optimizer steps of the whole run and of all nodes; ``None``: not known.
        limit: bytes.
    """
    step_s = _timed(spec, samples) if _ROOM * layout.nbytes <= limit else None
    return Estimate(
        node_bytes=simulation_bytes(spec, layout, 1),
        simulation_bytes=simulation_bytes(spec, layout, num_nodes),
        available_bytes=psutil.virtual_memory().available,
        step_s=step_s,
        simulation_s=None if step_s is None or steps is None else step_s * steps,
    )


def simulation_bytes(spec: ReplicaSpec, layout: Layout, num_nodes: int) -> int:
    """Return the memory of nodes that share a process, without the algorithm's own state."""
    copies = 1 if spec.algorithm.steps_at_commit else 2
    moments = {"sgd": int(bool(spec.optimizer.options.get("momentum")))}.get(spec.optimizer.name, 2)
    own = layout.nbytes * (copies + moments) + layout.buffer_nbytes * copies
    if spec.average is not None:
        own += layout.nbytes + layout.buffer_nbytes
    return own * num_nodes + layout.nbytes  # the gradient is shared


def _timed(spec: ReplicaSpec, samples: Samples) -> float | None:
    """Return the seconds of one batch, forward and backward, after one to get warm; ``None``: it cannot be done."""
    size = min(spec.batch_size, len(samples))
    if not size:
        return None
    bench = spec.bench(torch.device("cpu"))
    bench.shared.mode(training=True)
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        with seeded(spec.seed, bench.shared.device):
            bench.loss.of_batch(bench.loss.drawn(samples, torch.arange(size))).backward()
        seconds = time.perf_counter() - began
        if seconds > 1:
            break
    return seconds * spec.optimizer.accumulate


def default_store_bytes() -> int:
    """Return the size of the object store that Ray gives itself on this machine."""
    shared = 0
    with contextlib.suppress(OSError):
        shared = shutil.disk_usage("/dev/shm").total  # noqa: S108 - where Ray has it
    most = max(_LEAST_SHARED, int(_SHARE_OF_SHARED * shared))
    return min(int(_SHARE_OF_MEMORY * psutil.virtual_memory().available), most)


def store_warning(config: Config, layout: Layout) -> tuple[str, ...]:
    """Return what is likely to be a surprise about a Ray of our own on this machine."""
    cluster, nodes = config.cluster, range(config.num_nodes)
    if cluster.address != "local":
        return ()
    each = contribution_bytes(config.algorithm, layout, len(nodes))
    needed = stored_bytes(each, nodes, lambda node: ("", node // cluster.nodes_per_actor))[""]
    there = cluster.object_store_bytes or default_store_bytes()
    if needed <= there:
        return ()
    line = (
        f"on this machine alone an exchange may need {bytes_text(needed)} in Ray's object store, which has "
        f"{bytes_text(there)}: raise cluster.object_store_gb, or exchange less (a codec, a smaller model)"
    )
    return (line,)
