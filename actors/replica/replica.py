"""The replica: one node's model, data, optimizer and state. Implements ``Node``; knows no Ray and no clock of its own.

The trainable parameters are one flat contiguous tensor and the module's parameters are views into it, so that an
algorithm exchanges, mixes and restores a model in one operation. Floating-point buffers are a second flat tensor.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from starling.actors.data import Position
from starling.actors.data.generators import seeded
from starling.actors.replica.average import advance, averaged_model
from starling.actors.replica.digest import digest_tensors
from starling.actors.replica.node_data import NodeData
from starling.actors.replica.pace import Milestone, Pace
from starling.actors.replica.round_guard import RoundGuard
from starling.actors.replica.schedule_progress import ScheduleProgress
from starling.actors.replica.spec import NOT_STARTED, NonFiniteLossError, ReplicaSpec, node_name
from starling.actors.replica.staged_state import StagedState
from starling.actors.replica.trainer import Trainer
from starling.actors.training.node_optimizer import NodeOptimizer
from starling.actors.wire.finite import is_finite
from starling.algorithms.api import SERVER, View
from starling.algorithms.errors import ProgramError
from starling.algorithms.seeds import derive_seed, generator

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from torch import Tensor

    from starling.actors.data import Place
    from starling.actors.replica.node_data import DataSource
    from starling.actors.tasks import Samples
    from starling.actors.training.slab import ModelTensors, Slab
    from starling.algorithms.api import Evaluate, NodeId, State

_METRIC_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-/]*")
"""Names that every tracker takes."""


class NodeProgress(NamedTuple):
    """A node's position in its data and along the learning-rate schedule."""

    position: Position
    """Position of the next draw."""
    step: int
    """Optimizer steps that the schedule has counted."""
    milestone: Milestone
    """The node's place in the run, in rounds and optimizer steps."""


class Replica:
    """One logical participant, as its program sees it, and its transactional rounds.

    It owns its parts, which the host and the runtimes use directly: ``data`` draws samples, ``schedule`` counts steps,
    ``trainer`` computes, ``guard`` decides about values that are not finite.

    Args:
        node: its id; ``SERVER`` has no samples.
        spec: what it has in common with all others.
        source: its data.
        row: its tensors, a row of a slab, at whose workbench it takes turns; default: tensors of its own on the CPU.
        pace: of the run; default: as if it were the run's only node.
        clock: the runtime's, in seconds.
        incarnation: counts the processes that have embodied the node.
    """

    def __init__(
        self,
        node: NodeId,
        spec: ReplicaSpec,
        source: DataSource,
        *,
        row: tuple[Slab, int] | None = None,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.monotonic,
        incarnation: int = 0,
    ) -> None:
        self.id, self.spec, self.seed, self.incarnation = node, spec, spec.seed, incarnation
        self.round, self.num_rounds = NOT_STARTED, spec.rounds
        self.view = View(0, ())
        self.participates = True
        self._clock = clock
        self.slab, self.row = row or (spec.slab(torch.device("cpu")), 0)
        self.bench = self.slab.bench
        self.device, self.layout = self.bench.shared.device, self.bench.shared.layout
        self.tensors = self.slab.current[self.row]
        self.parameters, self.buffers = self.tensors.parameters, self.tensors.buffers
        self.data = NodeData(node, spec, self.bench, source)
        self.num_samples = self.data.num_samples
        pace = pace or Pace.of(spec, [self.num_samples], 1)
        self.schedule = ScheduleProgress(spec, pace, None if node == SERVER else self.num_samples)
        self.optimizer = NodeOptimizer(self.bench)
        self.guard = RoundGuard(node, self._undo, skips=spec.skip_nan)
        parts = self.data, self.optimizer, self.schedule, self.guard
        self.trainer = Trainer(node, spec, self.bench, self.tensors, *parts)
        self.reported: dict[str, float] = {}
        """Metrics that the program has reported in the open round."""
        self.shared = StagedState("shared")
        self.local = StagedState("local")
        for state in (self.shared, self.local):
            state.forbid_aliases_of(self.parameters, self.buffers)
        algorithm = spec.algorithm
        self._counts_rounds = not algorithm.synchronous and (node == SERVER or not algorithm.has_server)
        """Whether the node's own rounds count as the run's: the server's, or every node's without a server."""
        self.staged_round: int | None = None
        self._due: bytes | None = None
        """The record of the staged round, if its step is made by the commit."""
        self.committed_round = NOT_STARTED
        self.committed_progress = self._progress()
        self._committed_optimizer: State = self.optimizer.state() if spec.optimizer.rollback else None

    def _undo(self) -> None:
        self.slab.restore(self.row)
        self.optimizer.reset()

    # --- what the program sees -----------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        """The runtime's clock in seconds."""
        return self._clock()

    @property
    def committed(self) -> Tensor:
        """The parameters as of the last commit, shape (P,); not to be written to."""
        return self.committed_tensors().parameters

    def rng(self, purpose: str) -> torch.Generator:
        """Return a CPU generator that is a pure function of (run seed, round, node, purpose)."""
        return generator(self.spec.seed, self.round, self.id, purpose)

    def report(self, **metrics: float) -> None:
        """Report metrics of the open round by name; see ``Node.report``."""
        for name, value in metrics.items():
            if _METRIC_NAME.fullmatch(name) is None:
                raise ProgramError(f"node.report({name!r}=…): a name has letters, digits, '_', '-', '.' and '/' alone")
            if isinstance(value, bool) or not isinstance(value, int | float):
                kind = type(value).__name__
                raise ProgramError(f"node.report({name}=…): a {kind}, and not a number; of a tensor, give its .item()")
            self.reported[name] = float(value)

    def module(self, at: Tensor | None = None) -> Callable[..., Any]:
        """Return the model in evaluation mode as a function of its inputs, at parameters ``at`` or the current ones."""
        tensors: dict[str, Tensor] = {}
        if at is not None:
            tensors = {entry.name: at[entry.start : entry.stop].view(entry.shape) for entry in self.layout.entries}

        def call(*inputs: Any) -> Any:  # noqa: ANN401 - whatever the user's module takes and returns
            module = self.trainer.module
            self.bench.shared.mode(training=False)
            return torch.func.functional_call(module, tensors, inputs) if tensors else module(*inputs)

        return call

    # --- evaluation and results --------------------------------------------------------------------------------------

    def evaluate_at(self, operation: Evaluate) -> dict[str, float]:
        """Carry out ``Evaluate``, on all held-out data.

        Raises:
            ProgramError: this process has none, or ``at`` has the wrong shape.
        """
        if self.data.validation is None:
            raise ProgramError("Evaluate: this process has no held-out data")
        return self.evaluate(self.data.validation, None, self.parameters if operation.at is None else operation.at)

    def evaluate(
        self, samples: Samples, max_batches: int | None, at: Tensor | None = None, buffers: Tensor | None = None
    ) -> dict[str, float]:
        """Return the task's metrics on held-out samples.

        Args:
            samples: the held-out data.
            max_batches: bound on the batches looked at; ``None``: all.
            at: parameters, shape (P,); default: ``Algorithm.model``.
            buffers: shape (B,); default: the node's own.
        """
        at = self.spec.algorithm.model(self) if at is None else at
        # The same noise whoever evaluates and whenever: metrics are compared.
        chance = seeded(derive_seed(self.spec.seed, "evaluate"), self.device)
        with chance, self.bench.shared.at(self.tensors, at, buffers, moves=False):
            return self.bench.evaluator.evaluate(samples, self.spec.batch_size, max_batches)

    def model_tensors(self, at: Tensor | None = None, buffers: Tensor | None = None) -> dict[str, Tensor]:
        """Return the tensors of a model and its buffers by name, as they are saved; defaults as for ``evaluate``."""
        flat = (self.spec.algorithm.model(self) if at is None else at).detach()
        tensors = {entry.name: flat[entry.start : entry.stop].view(entry.shape) for entry in self.layout.entries}
        return tensors | self.bench.shared.named_buffers(self.tensors, buffers)

    def model_digest(self, at: Tensor | None = None, buffers: Tensor | None = None) -> str:
        """Return the digest of a model, the run's if it ended here; defaults as for ``evaluate``."""
        return digest_tensors(self.model_tensors(at, buffers))

    def committed_model(self) -> tuple[Tensor, Tensor]:
        """Return ``Algorithm.model`` on the committed state, and the committed buffers, also while a round is open.

        Shapes (P,) and (B,); not to be written to.
        """
        node = _Committed(self)
        return self.spec.algorithm.model(node), node.buffers

    def averaged_model(self) -> tuple[Tensor, Tensor]:
        """Return the running average of ``committed_model``; see ``actors.replica.average``."""
        return averaged_model(self)

    # --- rounds ------------------------------------------------------------------------------------------------------

    def begin(self, number: int, view: View, cohort: Collection[NodeId]) -> None:
        """Enter round ``number`` of the members of ``view``, in which ``cohort`` takes part."""
        self.round, self.view, self.participates = number, view, self.id in cohort
        self.reported = {}
        if self.spec.algorithm.synchronous:
            self.schedule.hear(number)
        for part in (self.data, self.trainer, self.guard):
            part.begin(number)
        self._version = self.parameters._version  # noqa: SLF001 - torch's counter of writes

    def stage(self, record: bytes | None = None) -> None:
        """End the round's program: its assignments wait for the commit.

        Args:
            record: from ``Algorithm.sealed``, of a round whose program has run.

        Raises:
            ProgramError: shared or local state was written in place, or parameters that the round was to leave alone.
            NonFiniteLossError: parameters or buffers are not finite, and the round cannot do without this node's.
        """
        self.shared.check_unwritten()
        self.local.check_unwritten()
        self._check_finite()
        if record is not None and self.spec.algorithm.steps_at_commit:
            if self.parameters._version != self._version:  # noqa: SLF001 - torch's counter of writes
                raise ProgramError("the round wrote to node.parameters, though its step is made on commit")
            self._due = record
        self.staged_round = self.round

    def _check_finite(self) -> None:
        """Keep values that are not finite from being committed."""
        at_fault = [name for name in ("parameters", "buffers") if not is_finite(getattr(self, name))]
        if not at_fault:
            if self.guard.skipping and not self.local.is_finite():
                self.local.rollback()  # it was made of what was not given to others
            return
        what = f"node.{' and node.'.join(at_fault)} not finite at the round's end"
        if self.id == SERVER or (self.spec.algorithm.replicated and at_fault != ["buffers"]):
            # What all have alike cannot be left out.
            where = f"{node_name(self.id)}, round {self.round}"
            raise NonFiniteLossError(f"{where}: {what}; lower optimizer.lr, or the outer one")
        self.guard.give_up(what)
        if not self.spec.algorithm.replicated:
            self.shared.rollback()
            self.local.rollback()

    def commit(self) -> None:
        """Make parameters, state and data position current."""
        self.make_step()
        self.slab.commit(self.row, self.row + 1)
        self.commit_state()

    def make_step(self) -> None:
        """Make the staged round's step, if it was left to the commit."""
        if self._due is not None:
            record, self._due = self._due, None
            self.spec.algorithm.replay(self, record)

    def commit_state(self) -> None:
        """Do ``commit`` without the parameters and the row of the slab."""
        if self._counts_rounds and self.round != NOT_STARTED:
            self.schedule.hear(self.schedule.milestone.round + 1)
        self.shared.commit()
        self.local.commit()
        self.committed_progress = self._progress()
        if self.spec.optimizer.rollback:
            self._committed_optimizer = self.optimizer.state()
        self.committed_round = self.round
        # Loaded state is committed without a staged round, and has its average.
        if self.spec.average is not None and self.staged_round is not None:
            advance(self.spec.average, self)
        self.staged_round = None
        self.data.num_drawn = 0

    def rollback(self) -> None:
        """Go back to the last commit; the optimizer's own state only with ``optimizer.rollback``."""
        self.shared.rollback()
        self.local.rollback()
        self.slab.restore(self.row)
        self.data.position, self.schedule.step, self.schedule.milestone = self.committed_progress
        if self.spec.optimizer.rollback:
            self.optimizer.load(self._committed_optimizer)
        self.staged_round = self._due = None

    def _progress(self) -> NodeProgress:
        return NodeProgress(self.data.position, self.schedule.step, self.schedule.milestone)

    def committed_tensors(self) -> ModelTensors:
        """Return the committed parameters, buffers and counters; not to be written to."""
        return self.slab.committed(self.row)

    def replan(self, place: Place) -> None:
        """Follow a new sampling plan, from the last commit on."""
        self.data.plan(place)
        self.num_samples = self.data.num_samples
        self.committed_progress = self._progress()

    def catch_up(
        self, number: int, step: int, position: Position | None = None, milestone: Milestone | None = None
    ) -> None:
        """Commit loaded state as that of round ``number``.

        The schedule goes on from ``step`` and ``milestone`` if these are ahead, the node's data at ``position`` if that
        is given.
        """
        schedule, data = self.schedule, self.data
        schedule.step = max(schedule.step, step)
        milestone = max(schedule.milestone, milestone or schedule.milestone)
        if position is not None:
            data.position = position
        drawn = data.num_drawn  # in a round that it has missed
        self.commit()
        schedule.milestone = milestone  # which is no round of its own
        self.committed_progress = self._progress()
        self.committed_round, data.num_drawn = number, drawn


class _Committed:
    """A node as its program would see it if the open round had not begun."""

    def __init__(self, replica: Replica) -> None:
        tensors = replica.committed_tensors()
        self.id, self.incarnation = replica.id, replica.incarnation
        self.round, self.view, self.participates = replica.committed_round, replica.view, replica.participates
        self.num_samples, self.layout, self.num_rounds = replica.num_samples, replica.layout, replica.num_rounds
        self.parameters, self.buffers = tensors.parameters, tensors.buffers
        self.committed, self.seed = tensors.parameters, replica.seed
        self.shared: dict[str, State] = replica.shared.committed()
        self.local: dict[str, State] = replica.local.committed()
        self._replica = replica

    @property
    def now(self) -> float:
        return self._replica.now

    def rng(self, purpose: str) -> torch.Generator:
        return self._replica.rng(purpose)

    def report(self, **metrics: float) -> None:
        """Ignore what is reported outside of a round."""

    def module(self, at: Tensor | None = None) -> Callable[..., Any]:
        return self._replica.module(self.parameters if at is None else at)
