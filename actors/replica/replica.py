"""The replica: a node's model, data, optimizer and state. Implements ``Node``; knows no Ray and no clock of its own.

The trainable parameters are one flat contiguous tensor and the module's parameters are views into it, so that an
algorithm exchanges, mixes and restores a model in one operation. Floating-point buffers are a second flat tensor.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from starling.actors.data import Epoch
from starling.actors.data.generators import seeded
from starling.actors.replica.digest import digest_tensors
from starling.actors.replica.learner import Learner, is_finite
from starling.actors.replica.spec import NOT_STARTED, Fence, Interrupted, NonFiniteLossError, ReplicaSpec
from starling.actors.replica.staged_state import StagedState
from starling.algorithms.api import SERVER, TrainReport, View
from starling.algorithms.errors import ProgramError
from starling.algorithms.seeds import derive_seed, generator

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from torch import Tensor

    from starling.actors.data import Indices, Place, Position, Sampler
    from starling.actors.replica.pace import Milestone, Pace
    from starling.actors.tasks import Samples
    from starling.actors.training.shared_module import ModelTensors, Slab
    from starling.algorithms.api import Evaluate, NodeId, State

__all__ = ["Fence", "Interrupted", "NonFiniteLossError", "Replica", "ReplicaSpec", "virtual"]


class Replica(Learner):
    """One logical participant; see ``algorithms.api.Node`` for what its program sees.

    Args:
        node: its id; ``SERVER`` has no samples.
        spec: what it has in common with all others.
        samples: the training data of all nodes.
        indices: those of this node, int64, shape (n,).
        device: where it computes, if it has no row; default: the CPU.
        row: its tensors, a row of a slab, at whose workbench it takes turns; default: those of its own.
        sampler: in which order it draws its samples.
        pace: what learning-rate schedules go by; default: as if it were the run's only node.
    """

    def __init__(
        self,
        node: NodeId,
        spec: ReplicaSpec,
        samples: Samples,
        indices: Indices,
        device: torch.device | None = None,
        row: tuple[Slab, int] | None = None,
        sampler: Sampler | None = None,
        pace: Pace | None = None,
    ) -> None:
        row = row or (spec.slab(device or torch.device("cpu")), 0)
        super().__init__(node, spec, samples, indices, row, sampler or Epoch(), pace)
        self.incarnation = 0
        self.num_rounds = spec.rounds
        self.view = View(0, ())
        self.participates = True
        self.clock: Callable[[], float] = time.monotonic
        self.staged_round: int | None = None
        self._due: bytes | None = None
        """What the staged round does to the parameters, if it is to be done by the commit."""
        self.committed_round = NOT_STARTED
        algorithm = spec.algorithm
        self._counts_rounds = not algorithm.synchronous and (node == SERVER or not algorithm.has_server)
        """Where each node has rounds of its own, the server's are the run's, or else each node's."""
        self.shared = StagedState("shared")
        self.local = StagedState("local")
        for state in (self.shared, self.local):
            state.forbid_aliases_of(self.parameters, self.buffers)
        self.num_void = 0
        """Samples drawn since the last commit, in rounds that were given up."""
        self._committed_place = self._place()
        self._committed_optimizer: State = None
        if spec.optimizer.rollback:
            self._committed_optimizer = self.optimizer.state()

    # --- what the program sees -----------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        """The runtime's clock in seconds."""
        return self.clock()

    @property
    def committed(self) -> Tensor:
        """The parameters as of the last commit, shape (P,); not to be written to."""
        return self.committed_tensors().parameters

    def rng(self, purpose: str) -> torch.Generator:
        """A CPU generator that is a pure function of (run seed, round, node, purpose)."""
        return generator(self.spec.seed, self.round, self.id, purpose)

    def module(self, at: Tensor | None = None) -> Callable[..., Any]:
        """The model in evaluation mode as a function of its inputs, at parameters ``at`` or at the current ones."""
        tensors: dict[str, Tensor] = {}
        if at is not None:
            tensors = {entry.name: at[entry.start : entry.stop].view(entry.shape) for entry in self.layout.entries}

        def call(*inputs: Any) -> Any:  # noqa: ANN401 - whatever the user's module takes and returns
            module = self._module
            self.bench.mode(training=False)
            return torch.func.functional_call(module, tensors, inputs) if tensors else module(*inputs)

        return call

    def evaluate_at(self, operation: Evaluate) -> dict[str, float]:
        """Carry out ``Evaluate``, on all held-out data.

        Raises:
            ProgramError: this process has none, or ``at`` has the wrong shape.
        """
        if self.validation is None:
            raise ProgramError("Evaluate: this process has no held-out data")
        return self.evaluate(self.validation, None, self.parameters if operation.at is None else operation.at)

    # --- evaluation and results --------------------------------------------------------------------------------------

    def evaluate(
        self, samples: Samples, max_batches: int | None, at: Tensor | None = None, buffers: Tensor | None = None
    ) -> dict[str, float]:
        """The task's metrics on held-out samples at ``at`` (default: ``Algorithm.model``) and ``buffers`` (own)."""
        at = self.spec.algorithm.model(self) if at is None else at
        # The same noise whoever evaluates and whenever: metrics are compared.
        chance = seeded(derive_seed(self.spec.seed, "evaluate"), self.device)
        with chance, self.bench.at(self.tensors, at, buffers, moves=False):
            return self.bench.evaluate(samples, self.spec.batch_size, max_batches)

    def model_tensors(self, at: Tensor | None = None, buffers: Tensor | None = None) -> dict[str, Tensor]:
        """The tensors of a model and its buffers by name, as for ``evaluate``: what is saved and digested."""
        flat = (self.spec.algorithm.model(self) if at is None else at).detach()
        tensors = {entry.name: flat[entry.start : entry.stop].view(entry.shape) for entry in self.layout.entries}
        return tensors | self.bench.named_buffers(self.tensors, buffers)

    def model_digest(self, at: Tensor | None = None, buffers: Tensor | None = None) -> str:
        """The digest of the run, if it ended here."""
        return digest_tensors(self.model_tensors(at, buffers))

    def committed_model(self) -> tuple[Tensor, Tensor]:
        """What ``Algorithm.model`` gives on the committed state, and the committed buffers, also while a round is open.

        Shapes (P,) and (B,); not to be written to.
        """
        node = _Committed(self)
        return self.spec.algorithm.model(node), node.buffers

    # --- rounds ------------------------------------------------------------------------------------------------------

    def begin(self, number: int, view: View, cohort: Collection[NodeId]) -> None:
        """Enter a round: who is in, and who takes part."""
        self.round, self.view, self.skipping = number, view, False
        if self.spec.algorithm.synchronous:
            self.hear(number)
        self.participates = self.id in cohort
        self._draws = {}
        self.num_void = self.num_drawn
        self._version = self.parameters._version  # noqa: SLF001 - torch's counter of writes

    def stage(self, record: bytes | None = None) -> None:
        """End the round's program: what it assigned waits for the commit.

        Args:
            record: what ``Algorithm.sealed`` gives, of a round whose program has run.

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
        """Keep what is not finite from being committed."""
        at_fault = [name for name in ("parameters", "buffers") if not is_finite(getattr(self, name))]
        if not at_fault:
            if self.skipping and not self.local.is_finite():
                self.local.rollback()  # it was made of what was not given to others
            return
        what = f"node.{' and node.'.join(at_fault)} not finite at the round's end"
        if self.id == SERVER or (self.spec.algorithm.replicated and at_fault != ["buffers"]):
            # What all have alike cannot be left out.
            raise NonFiniteLossError(
                f"{self._name()}, round {self.round}: {what}; lower optimizer.lr, or the outer one"
            )
        self.give_up_round(what)
        if not self.spec.algorithm.replicated:
            self.shared.rollback()
            self.local.rollback()

    def settle(self, committed: int) -> bool:
        """Make a staged round current if the controller has committed it; say whether. Idempotent."""
        due = self.staged_round is not None and committed >= self.staged_round
        if due:
            self.commit()
        return due

    def commit(self) -> None:
        """Make parameters, state and data position current."""
        self.make_step()
        self.slab.commit(self.row, self.row + 1)
        self.commit_state()

    def make_step(self) -> None:
        """Do to the parameters what the staged round does, if that was left to the commit."""
        if self._due is not None:
            record, self._due = self._due, None
            self.spec.algorithm.replay(self, record)

    def commit_state(self) -> None:
        """All of ``commit`` but the parameters and the row of the slab."""
        if self._counts_rounds and self.round != NOT_STARTED:
            self.hear(self.milestone.round + 1)
        self.shared.commit()
        self.local.commit()
        self._committed_place = self._place()
        if self.spec.optimizer.rollback:
            self._committed_optimizer = self.optimizer.state()
        self.committed_round = self.round
        self.staged_round = None
        self.num_drawn = 0

    def rollback(self) -> None:
        """Go back to the last commit; the optimizer's own state only with ``optimizer.rollback``."""
        self.shared.rollback()
        self.local.rollback()
        self.slab.restore(self.row)
        self.position, self._step, self.milestone = self._committed_place
        if self.spec.optimizer.rollback:
            self.optimizer.load(self._committed_optimizer)
        self.staged_round = self._due = None

    def _place(self) -> tuple[Position, int, Milestone]:
        return self.position, self._step, self.milestone

    def committed_tensors(self) -> ModelTensors:
        """The committed parameters, buffers and counters; not to be written to."""
        return self.slab.committed(self.row)

    @property
    def committed_position(self) -> Position:
        """Where in its data the node was at the last commit."""
        return self._committed_place[0]

    @property
    def committed_step(self) -> int:
        """How many optimizer steps the schedule had counted at the last commit."""
        return self._committed_place[1]

    @property
    def committed_milestone(self) -> Milestone:
        """How far along the run the node was at the last commit."""
        return self._committed_place[2]

    def replan(self, place: Place) -> None:
        """Draw as ``place`` says, from the last commit on."""
        self.plan(place)
        self._committed_place = self._place()

    def catch_up(
        self, number: int, step: int, position: Position | None = None, milestone: Milestone | None = None
    ) -> None:
        """Commit what was loaded as that of round ``number``.

        The schedule goes on from ``step`` and ``milestone`` if these are ahead, the node's data at ``position`` if that
        is given.
        """
        self._step = max(self._step, step)
        milestone = max(self.milestone, milestone or self.milestone)
        if position is not None:
            self.position = position
        drawn = self.num_drawn  # in a round that it has missed
        self.commit()
        self.milestone = milestone  # which is no round of its own
        self._committed_place = self._place()
        self.committed_round, self.num_drawn = number, drawn


class _Committed:
    """A node as its program would see it if the round that is open had not begun."""

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

    def module(self, at: Tensor | None = None) -> Callable[..., Any]:
        return self._replica.module(self.parameters if at is None else at)


def virtual(report: TrainReport, seconds: float) -> TrainReport:
    """The report with the simulator's duration instead of this machine's."""
    return TrainReport(report.loss, report.num_samples, report.num_steps, seconds)
