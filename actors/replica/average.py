"""Running averages of a run's iterates, the models after its rounds: evaluated beside the model, and saved with it.

A node advances its average when a round is committed. The average of the parameters is shared state. So joiners are
given it, checkpoints hold it, and replicas that have one model have one average. The weights depend on the round alone:
where nodes' models differ, the mean of their averages is the average of their mean models. The average of the
floating-point buffers is the node's own, as buffers are. A server holds both as its own.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from pydantic import Field, NonNegativeInt
from torch import Tensor

from starling.algorithms.api import SERVER
from starling.algorithms.registry import Part

if TYPE_CHECKING:
    from starling.actors.replica.replica import Replica

_PARAMETERS = "evaluation.average"
_BUFFERS = "evaluation.average.buffers"
"""Keys of node state. No field of a ``NodeState`` has a dot in its name."""


class Average(Part, family="average", catalog="starling.actors.replica.average"):
    """A running average of iterates x_0, x_1, …, the models after the rounds 0, 1 and so on."""

    @property
    def label(self) -> str:
        """The beginning of the names of its metrics: ``ema_loss``."""
        return type(self).part_name or type(self).__name__.lower()

    @abstractmethod
    def weight(self, number: int, num_rounds: int) -> float:
        """Return w in [0, 1] with which the model after round ``number`` enters: a ← (1 - w) a + w x.

        1 begins anew with x. ``num_rounds`` are those of the whole run.
        """


class Ema(Average, name="ema"):
    """Exponential moving average: a ← d a + (1 - d) x, from a = x_0; it looks back about 1/(1 - d) rounds."""

    decay: float = Field(default=0.9, ge=0, lt=1)  # d; 0: the model itself

    def weight(self, number: int, num_rounds: int) -> float:
        del number, num_rounds
        return 1 - self.decay


class Tail(Average, name="tail"):
    """Uniform mean of the last iterates: a = (x_s + … + x_t) / (t - s + 1), and x_t before round s.

    Reference: Polyak, Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM J. Control Optim., 1992;
    of the last half: Rakhlin et al., "Making Gradient Descent Optimal for Strongly Convex Stochastic Optimization",
    ICML 2012, arXiv:1109.5647.
    """

    fraction: float = Field(default=0.5, gt=0, le=1)  # of the run's rounds, the last ones
    start: NonNegativeInt | None = None  # s, the first round, instead of a fraction

    def weight(self, number: int, num_rounds: int) -> float:
        """Return 1/(t - s + 1).

        >>> [round(Tail().weight(number, 6), 2) for number in range(6)]
        [1.0, 1.0, 1.0, 1.0, 0.5, 0.33]
        """
        start = num_rounds - max(1, round(self.fraction * num_rounds)) if self.start is None else self.start
        return 1 / max(1, number - start + 1)


def advance(average: Average, node: Replica) -> None:
    """Take the model that ``node`` has just committed into its average."""
    if node.id != SERVER and node.spec.algorithm.has_server:
        return  # the server's model is the run's
    weight = average.weight(node.committed_round, node.num_rounds)
    model, buffers = node.committed_model()
    home = node.local if node.id == SERVER else node.shared
    home[_PARAMETERS] = _mixed(home.get(_PARAMETERS), model, weight)
    if buffers.numel():
        node.local[_BUFFERS] = _mixed(node.local.get(_BUFFERS), buffers, weight)
    node.shared.commit()
    node.local.commit()


def averaged_model(node: Replica) -> tuple[Tensor, Tensor]:
    """Return the committed average of parameters, shape (P,), and of buffers, shape (B,); the model without an average.

    Not to be written to.
    """
    model, buffers = node.committed_model()
    home = node.local if node.id == SERVER else node.shared
    found = home.committed().get(_PARAMETERS), node.local.committed().get(_BUFFERS)
    parameters, own = (one if isinstance(one, Tensor) else None for one in found)
    return model if parameters is None else parameters, buffers if own is None else own


def _mixed(before: object, model: Tensor, weight: float) -> Tensor:
    # Weight 1 gives the bits of the model: 0 · a + x is NaN where a is infinite, and 0.0 where x is -0.0.
    if not isinstance(before, Tensor) or weight == 1:
        return model.detach().clone()
    # Rounded apart: where a fused multiply-add is used depends on the machine.
    return before.mul(1 - weight).add_(model.detach().mul(weight))
