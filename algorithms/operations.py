"""Operations of one node: train, draw a batch, differentiate, evaluate, wait. None of them meets other nodes."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar

from torch import Tensor

from starling.algorithms.node import NodeId
from starling.algorithms.noise import Perturbed
from starling.algorithms.rules import DataBatch, Rule

T = TypeVar("T")


class Operation(Generic[T]):
    """An operation that a program awaits; awaiting it returns its result of type ``T``.

    Plain generators, no event loop: ``await operation`` yields the operation itself to whoever drives the program,
    and returns what the driver sends back.
    """

    def __await__(self) -> Generator[Operation[T], T, T]:
        return (yield self)


class TrainReport(NamedTuple):
    """Result of a ``Train``."""

    loss: float
    """Mean over the samples; NaN when the node skips the round (``on_nan: skip``)."""
    num_samples: int
    """Samples that were trained on: of the node's own part or, while others are away, of theirs."""
    num_steps: int
    seconds: float


@dataclass(frozen=True)
class Train(Operation[TrainReport]):
    """Take local optimizer steps on the node's own data: ``steps`` of them, or whole ``epochs``.

    With a ``rule`` each step uses the gradient that the rule gives, on the step's whole batch. In this ``Train`` alone
    ``batch_size`` is the number of samples of a step (default: ``data.batch_size`` × ``optimizer.accumulate``), and
    ``lr_factor`` multiplies the scheduled learning rate. With ``only`` the steps move these entries of the layout, by
    their names or those of submodules (``("blocks.0", "head.bias")``). A step leaves all others alone, as torch's
    optimizers leave parameters without a gradient: no decay, and moments stay.
    """

    steps: int | None = None
    epochs: int | None = None
    rule: Rule | None = None
    batch_size: int | None = None
    lr_factor: float = 1.0
    only: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse anything but exactly one positive amount of work, and sizes and factors that are not positive."""
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"Train(batch_size={self.batch_size}): a step takes at least one sample")
        if self.only is not None and (isinstance(self.only, str) or not self.only):
            raise ValueError(f"Train(only={self.only!r}): takes a tuple of names, at least one")
        if not 0 < self.lr_factor < math.inf:
            raise ValueError(f"Train(lr_factor={self.lr_factor}): must be positive and finite")
        amount = self.epochs if self.steps is None else self.steps
        if amount is None or amount < 1 or (self.steps is not None and self.epochs is not None):
            message = f"Train takes either steps or epochs, at least 1; got steps={self.steps}, epochs={self.epochs}"
            raise ValueError(message)


@dataclass(frozen=True)
class Batch(Operation[DataBatch]):
    """Draw at most ``size`` samples (default: the configured batch size).

    From the node's own training data they are the next in its epoch. With ``part`` they come from the samples of that
    node, chosen at random without replacement: the same on all nodes that draw from a part in a round, call for call.
    Held-out data are drawn alike. With a ``key`` they depend on (run seed, part, key, size) alone, so that a later
    round can draw ``Batch(part=3, key="job 7")`` again.
    """

    source: Literal["train", "validation"] = "train"
    size: int | None = None
    part: NodeId | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        """Refuse a key without a part."""
        if self.key is not None and self.part is None:
            raise ValueError(f"Batch(key={self.key!r}) needs a part: only what is drawn from one can be drawn again")


@dataclass(frozen=True)
class GradientReport:
    """A gradient and the loss at the same point."""

    gradient: Tensor
    """Shape (P,)."""
    loss: float
    num_samples: int


@dataclass(frozen=True, eq=False)
class Gradient(Operation[GradientReport]):
    """The mean gradient at parameters ``at`` (default: the current ones) on ``batch`` (default: a fresh one).

    Shape (P,), a tensor of the program's own.
    """

    at: Tensor | None = None
    batch: DataBatch | None = None


@dataclass(frozen=True, eq=False)
class Step(Operation[TrainReport]):
    """Take one step of the node's optimizer along ``gradient``, shape (P,): clipped and scheduled as in ``Train``.

    For programs that combine gradients of several nodes first. The result has the loss and samples of ``report``, and
    no steps: their time is that of the ``Gradient``. Where all nodes step alike, their optimizers must have seen the
    same; with ``fresh`` each begins anew, as that of a joiner does.
    """

    gradient: Tensor
    report: GradientReport
    fresh: bool = False


@dataclass(frozen=True, eq=False)
class Loss(Operation[float]):
    """The mean loss at parameters ``at`` on ``batch``; defaults as for ``Gradient``. Forward only.

    At a ``Perturbed`` point each operation of the model takes its parameters perturbed, and drops them afterwards. So
    only the largest of them is in memory, and the loss has the bits of that at a tensor with the perturbed values.

    With ``probe`` the loss is one of several that are compared. A model whose loss depends on chance, or that keeps
    statistics, is then refused with the layer's name. A loss that is not finite is the program's to handle.
    """

    at: Tensor | Perturbed | None = None
    batch: DataBatch | None = None
    probe: bool = False


@dataclass(frozen=True, eq=False)
class Evaluate(Operation[dict[str, float]]):
    """The task's metrics on held-out data at parameters ``at``."""

    at: Tensor | None = None


@dataclass(frozen=True)
class Sleep(Operation[None]):
    """Let ``seconds`` of the runtime's clock pass."""

    seconds: float
