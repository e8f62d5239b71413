"""Settings that all replicas of a run share, and the fence that stops them."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from pydantic import BaseModel

from starling.actors.training.slab import Slab
from starling.actors.training.workbench import Workbench
from starling.algorithms.api import SERVER
from starling.algorithms.errors import StarlingError

if TYPE_CHECKING:
    from starling.actors.replica.average import Average
    from starling.actors.tasks import Task
    from starling.actors.training.optimizers import OptimizerConfig
    from starling.algorithms.api import Algorithm, NodeId


NOT_STARTED = -1
"""The round before the first."""


def node_name(node: NodeId) -> str:
    """Return a node's name in messages."""
    return "server" if node == SERVER else f"node {node}"


class NonFiniteLossError(StarlingError):
    """A training loss was NaN or infinite."""


class Interrupted(Exception):  # noqa: N818 - not an error: the round was cancelled from outside
    """The fence went up while the node was computing."""


class Fence(Protocol):
    """Tells a computing node to stop; ``threading.Event`` is one."""

    def is_set(self) -> bool:
        """Whether to stop before the next step."""
        ...


@dataclass(frozen=True)
class ReplicaSpec:
    """Settings that all replicas of a run share."""

    algorithm: Algorithm
    task: Task
    optimizer: OptimizerConfig
    batch_size: int
    seed: int
    rounds: int
    skip_nan: bool = False
    min_batch: int = 1
    average: Average | None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the settings: nodes with equal fingerprints can load one another's state."""
        parts = self.algorithm, self.task, self.optimizer, self.batch_size, self.seed, self.rounds, self.skip_nan
        parts += (self.min_batch,) if self.min_batch > 1 else ()
        parts += () if self.average is None else (self.average,)
        plain = [one.model_dump(mode="json") if isinstance(one, BaseModel) else one for one in parts]
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()

    @property
    def samples_per_step(self) -> int:
        """Samples of one optimizer step."""
        return self.batch_size * self.optimizer.accumulate

    def bench(self, device: torch.device) -> Workbench:
        """Return a workbench for nodes of this run."""
        return Workbench(self.task, self.optimizer, self.seed, device)

    def slab(self, device: torch.device, num_rows: int = 1) -> Slab:
        """Return the tensors of ``num_rows`` nodes of this run, with a workbench."""
        return Slab(self.bench(device), num_rows, keeps_copy=not self.algorithm.steps_at_commit)
