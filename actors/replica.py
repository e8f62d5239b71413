"""The replica: a node's model, data, optimizer and state. Implements ``Node``; knows no Ray and no clock of its own.

The trainable parameters are one flat contiguous tensor and the module's parameters are views into it, so that an
algorithm exchanges, mixes and restores a model in one operation. Floating-point buffers are a second flat tensor.
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from actors import optimizers
from actors.data import EpochSampler
from actors.digest import digest_tensors
from actors.state import StagedState
from algorithms.api import Layout, LayoutEntry, TrainReport, View
from algorithms.errors import StarlingError
from algorithms.seeds import derive_seed, generator

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from actors.data import Position
    from actors.optimizers import OptimizerConfig
    from actors.tasks import Samples, Task
    from algorithms.api import Algorithm, NodeId, Train

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}
"""Dtype of the master weights by ``optimizer.precision``; bf16 is autocast over fp32 master weights."""

_NOT_STARTED = -1


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
    """What all replicas of a run have in common."""

    algorithm: Algorithm
    task: Task
    optimizer: OptimizerConfig
    batch_size: int
    seed: int
    rounds: int
    skip_nan: bool = False


class Scratch:
    """The flat gradient, allocated at the first step. Nodes of one process train in turn, and share it."""

    gradient: Tensor | None = None


class Replica:
    """One logical participant; see ``algorithms.api.Node`` for what its program sees."""

    def __init__(
        self, node: NodeId, spec: ReplicaSpec, samples: Samples, indices: Tensor, device: torch.device | None = None
    ) -> None:
        self.id = node
        self.incarnation = 0
        self.spec = spec
        self.device = device or torch.device("cpu")
        self.round = _NOT_STARTED
        self.view = View(0, ())
        self.participates = True
        self.clock: Callable[[], float] = time.monotonic
        self.num_samples = len(indices)
        self.skipping = False
        """Set for the rest of a round in which the loss was not finite (``on_nan: skip``): contributes nothing."""
        self.staged_round: int | None = None
        self._samples = samples
        self._sampler = EpochSampler(indices, spec.seed, node)
        self._dtype = DTYPES[spec.optimizer.precision]
        self._module = self._build_module()
        self._named = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        self.layout, self.parameters, self.buffers = self._flatten()
        self._counters = [buffer for buffer in self._module.buffers() if not buffer.is_floating_point()]
        self.shared = StagedState("shared")
        self.local = StagedState("local")
        for state in (self.shared, self.local):
            state.forbid_aliases_of(self.parameters, self.buffers)
        self._scratch = Scratch()
        self._gradient: Tensor | None = None
        self._optimizer = self._make_optimizer()
        self._step = 0
        self._samples_per_step = spec.batch_size * spec.optimizer.accumulate
        steps_per_round = spec.algorithm.steps_per_round(self.num_samples, self._samples_per_step)
        self._total_steps = spec.optimizer.schedule.total_steps or max(1, spec.rounds * steps_per_round)
        spec.optimizer.schedule.factor(0, self._total_steps)  # raises, before anything is trained, if it cannot work
        self._committed = self._snapshot()

    # --- what the program sees -----------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        """The runtime's clock in seconds."""
        return self.clock()

    def rng(self, purpose: str) -> torch.Generator:
        """A CPU generator that is a pure function of (run seed, round, node, purpose)."""
        return generator(self.spec.seed, self.round, self.id, purpose)

    def module(self, at: Tensor | None = None) -> Callable[..., Any]:
        """The model as a function of its inputs, at parameters ``at`` or at the current ones."""
        if at is None:
            return self._module
        tensors = {entry.name: at[entry.start : entry.stop].view(entry.shape) for entry in self.layout.entries}

        def call(*inputs: Any) -> Any:  # noqa: ANN401 - whatever the user's module takes and returns
            return torch.func.functional_call(self._module, tensors, inputs)

        return call

    # --- construction ----------------------------------------------------------------------------------------------

    def _build_module(self) -> nn.Module:
        with _seeded(derive_seed(self.spec.seed, "init"), self.device):
            module = self.spec.task.build()
        return module.to(device=self.device, dtype=self._dtype)

    def _flatten(self) -> tuple[Layout, Tensor, Tensor]:
        entries: list[LayoutEntry] = []
        start = 0
        for name, parameter in self._named.items():
            stop = start + parameter.numel()
            entries.append(LayoutEntry(name, start, stop, tuple(parameter.shape), _block_of(name)))
            start = stop
        parameters = torch.empty(start, dtype=self._dtype, device=self.device)
        for entry, parameter in zip(entries, self._named.values(), strict=True):
            view = parameters[entry.start : entry.stop].view(entry.shape)
            view.copy_(parameter.detach())
            parameter.data = view
        floating = [(name, buffer) for name, buffer in self._module.named_buffers() if buffer.is_floating_point()]
        buffers = torch.empty(sum(buffer.numel() for _, buffer in floating), dtype=self._dtype, device=self.device)
        start = 0
        for name, buffer in floating:
            view = buffers[start : start + buffer.numel()].view(buffer.shape)
            view.copy_(buffer)
            owner, _, attribute = name.rpartition(".")
            self._module.get_submodule(owner)._buffers[attribute] = view  # noqa: SLF001 - the only way to rebind one
            start += buffer.numel()
        return Layout(tuple(entries), self._dtype, buffers.numel()), parameters, buffers

    def _make_optimizer(self) -> torch.optim.Optimizer:
        config = self.spec.optimizer
        if optimizers.is_elementwise(config):
            # One flat tensor instead of many: the same bits, and one kernel instead of one per layer.
            self._trained: list[Tensor] = [nn.Parameter(self.parameters)]
            if self._gradient is not None:
                self._trained[0].grad = self._gradient
        else:
            self._trained = list(self._named.values())
        return optimizers.build(config, self._trained)

    # --- training --------------------------------------------------------------------------------------------------

    def train(self, operation: Train, fence: Fence) -> TrainReport:
        """Carry out ``Train``; the report's ``seconds`` are this machine's.

        Raises:
            NonFiniteLossError: the loss or the parameters became NaN or infinite, and ``on_nan`` is ``stop``.
            Interrupted: the fence went up.
        """
        began = time.perf_counter()
        config = self.spec.optimizer
        steps = operation.steps or (operation.epochs or 0) * self._sampler.steps_per_epoch(self._samples_per_step)
        if not self._module.training:
            self._module.train()
        losses: list[float | Tensor] = []
        drawn = 0
        immediate = self.device.type == "cpu"
        rate = config.lr
        with _seeded(derive_seed(self.spec.seed, self.round, self.id, self._step, "train"), self.device):
            for _ in range(steps):
                if fence.is_set():
                    raise Interrupted
                loss, num_samples = self._backward()
                if config.grad_clip is not None:
                    nn.utils.clip_grad_norm_(self._trained, config.grad_clip)
                rate = config.lr * config.schedule.factor(self._step, self._total_steps)
                for group in self._optimizer.param_groups:
                    group["lr"] = rate
                self._optimizer.step()
                self._step += 1
                drawn += num_samples
                # On a GPU reading a loss waits for the device, so they are looked at once, at the end.
                losses.append(loss.item() if immediate else loss)
                if immediate and not math.isfinite(losses[-1]):
                    break
        values = [float(loss) for loss in losses]
        seconds = time.perf_counter() - began
        bad = next((step for step, value in enumerate(values) if not math.isfinite(value)), None)
        if bad is not None:
            self._give_up_round(f"loss is {values[bad]}", bad, rate)
            return TrainReport(math.nan, 0, 0, seconds)
        # The last step's own result is in no loss yet, and must not reach the other nodes.
        if not math.isfinite(self.parameters.sum()):
            self._give_up_round("parameters are not finite", steps - 1, rate)
            return TrainReport(math.nan, 0, 0, seconds)
        return TrainReport(sum(values) / len(values), drawn, steps, seconds)

    def _backward(self) -> tuple[Tensor, int]:
        """Fill the gradient of one optimizer step; return the mean loss and the number of samples."""
        self._zero_gradient()
        # Drawn at once and weighted by size: k batches of b are one batch of k·b, also where an epoch ends.
        drawn = self._sampler.next(self._samples_per_step)
        total: Tensor | None = None
        for indices in drawn.split(self.spec.batch_size):
            with self._autocast():
                loss = self.spec.task.loss(self._module, self._to_device(self._samples.batch(indices)))
            if len(indices) < len(drawn):
                loss = loss * (len(indices) / len(drawn))
            loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total, len(drawn)

    def share_scratch(self, other: Replica) -> None:
        """Use the gradient of a replica of the same form in this process: each needs one only within a step."""
        if self.device == other.device and self.layout == other.layout:
            self._scratch = other._scratch

    def _zero_gradient(self) -> None:
        if self._scratch.gradient is None:
            self._scratch.gradient = torch.zeros_like(self.parameters)
        else:
            self._scratch.gradient.zero_()
        if self._gradient is not self._scratch.gradient:
            gradient = self._gradient = self._scratch.gradient
            for entry, parameter in zip(self.layout.entries, self._named.values(), strict=True):
                parameter.grad = gradient[entry.start : entry.stop].view(entry.shape)
            if len(self._trained) == 1 and self._trained[0].shape == gradient.shape:
                self._trained[0].grad = gradient

    def _give_up_round(self, what: str, step: int, rate: float) -> None:
        if not self.spec.skip_nan:
            where = f"node {self.id}, round {self.round}: {what} after inner step {step} (lr {rate:.3g})"
            message = f"{where}; lower optimizer.lr, or set on_nan: skip to go on without this node's round"
            raise NonFiniteLossError(message)
        # The round goes on with what was committed; the optimizer's moments have seen the NaN and are made anew.
        self.skipping = True
        self._restore()
        self._optimizer = self._make_optimizer()

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.spec.optimizer.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def _to_device(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.device.type == "cpu" and self._dtype == torch.float32:
            return tuple(one.float() if one.dtype == torch.float64 else one for one in batch)
        return tuple(one.to(self.device, self._dtype if one.is_floating_point() else one.dtype) for one in batch)

    # --- evaluation and results --------------------------------------------------------------------------------------

    def evaluate(self, samples: Samples, max_batches: int | None) -> dict[str, float]:
        """The task's metrics of ``Algorithm.model`` on held-out samples, in batches of at least 256 samples."""
        task = self.spec.task
        size = max(self.spec.batch_size, 256)
        self._module.eval()
        sums: dict[str, float] = {}
        seen = 0
        with torch.no_grad(), self._at(self.spec.algorithm.model(self)), self._autocast():
            for number, start in enumerate(range(0, len(samples), size)):
                if max_batches is not None and number >= max_batches:
                    break
                indices = torch.arange(start, min(start + size, len(samples)))
                batch = self._to_device(samples.batch(indices))
                for name, value in task.metrics(self._module, batch).items():
                    sums[name] = sums.get(name, 0.0) + float(value) * len(indices)
                seen += len(indices)
        return task.summary({name: value / seen for name, value in sums.items()})

    @contextlib.contextmanager
    def _at(self, point: Tensor) -> Iterator[None]:
        """Compute at another point; the parameters come back to the last bit."""
        if point is self.parameters:
            yield
            return
        kept = self.parameters.clone()
        self.parameters.copy_(point)
        try:
            yield
        finally:
            self.parameters.copy_(kept)

    def model_tensors(self) -> dict[str, Tensor]:
        """The tensors of ``Algorithm.model`` and the module's buffers by name: what is saved and digested."""
        flat = self.spec.algorithm.model(self).detach()
        tensors = {entry.name: flat[entry.start : entry.stop].view(entry.shape) for entry in self.layout.entries}
        return tensors | {name: buffer.detach() for name, buffer in self._module.named_buffers()}

    def model_digest(self) -> str:
        """The digest of the run, if it ended here."""
        return digest_tensors(self.model_tensors())

    # --- rounds ------------------------------------------------------------------------------------------------------

    def begin(self, number: int, view: View, cohort: Collection[NodeId]) -> None:
        """Enter a round: who is in, and who takes part."""
        self.round, self.view, self.skipping = number, view, False
        self.participates = self.id in cohort

    def stage(self) -> None:
        """End the round's program: what it assigned waits for the commit.

        Raises:
            ProgramError: shared or local state was written in place.
        """
        self.shared.check_unwritten()
        self.local.check_unwritten()
        self.staged_round = self.round

    def settle(self, committed: int) -> bool:
        """Make a staged round current if the controller has committed it; say whether. Idempotent."""
        due = self.staged_round is not None and committed >= self.staged_round
        if due:
            self.commit()
        return due

    def commit(self) -> None:
        """Make parameters, state and data position current."""
        self.shared.commit()
        self.local.commit()
        self._committed = self._snapshot(into=self._committed)
        self.staged_round = None

    def rollback(self) -> None:
        """Go back to the last commit. The optimizer's own state is not rolled back."""
        self.shared.rollback()
        self.local.rollback()
        self._restore()
        self._sampler.position, self._step = self._committed.position, self._committed.step
        self.staged_round = None

    def _snapshot(self, into: _Committed | None = None) -> _Committed:
        if into is None:
            parameters, buffers = self.parameters.clone(), self.buffers.clone()
        else:
            parameters, buffers = into.parameters.copy_(self.parameters), into.buffers.copy_(self.buffers)
        counters = [counter.clone() for counter in self._counters]
        return _Committed(parameters, buffers, counters, self._sampler.position, self._step)

    def _restore(self) -> None:
        self.parameters.copy_(self._committed.parameters)
        self.buffers.copy_(self._committed.buffers)
        for counter, committed in zip(self._counters, self._committed.counters, strict=True):
            counter.copy_(committed)


@dataclass(frozen=True)
class _Committed:
    parameters: Tensor
    buffers: Tensor
    counters: list[Tensor]
    """Buffers that are not floating-point: how many batches a batch norm has seen, say."""
    position: Position
    step: int


def virtual(report: TrainReport, seconds: float) -> TrainReport:
    """The report with the simulator's duration instead of this machine's."""
    return replace(report, seconds=seconds)


def _block_of(name: str) -> str:
    """The submodule that a parameter belongs to: the path up to the first number, else its first component."""
    path = name.split(".")
    for index, component in enumerate(path):
        if component.isdigit():
            return ".".join(path[: index + 1])
    return path[0] if len(path) > 1 else ""


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators for code that can only use those (initialisation, dropout), and put them back after."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()  # before its first use a device has no generator
        generators.append(torch.cuda.default_generators[device.index or 0])
    # Not torch.random.fork_rng, which takes 60 times as long: a round of a small node is a few hundred microseconds.
    states = [one.get_state() for one in generators]
    try:
        for one in generators:
            one.manual_seed(seed)
        yield
    finally:
        for one, state in zip(generators, states, strict=True):
            one.set_state(state)
