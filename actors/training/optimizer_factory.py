"""Makes optimizers of the shared module's parameters, in the form that they see these: as one flat tensor, or many."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starling.actors.training import optimizers
from starling.actors.training.updates import update_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from starling.actors.training.optimizers import OptimizerConfig
    from starling.actors.training.shared_module import SharedModule


class OptimizerFactory:
    """Makes the optimizers of the nodes of one process.

    Args:
        config: of the optimizer.
        shared: the module.

    Raises:
        SettingsError: the optimizer does not take such parameters.
    """

    def __init__(self, config: OptimizerConfig, shared: SharedModule) -> None:
        self._config, self._shared = config, shared
        self.is_flat = optimizers.is_elementwise(config)
        """Whether the optimizer sees one flat parameter."""
        self.trained: list[Tensor] = [shared.flat] if self.is_flat else [*shared.parameters]
        plain = config.name.lower().replace("_", "")
        # On a GPU torch has faster ones, which it chooses by itself.
        self.update = update_of(plain, config.options) if self.is_flat and shared.device.type == "cpu" else None
        """The optimizer's step as a function of flat tensors; None: torch's object takes it."""
        if self.update is None:
            self.make()  # raises before anything is trained

    def make(self, *, one_by_one: bool = False) -> Optimizer:
        """Return a fresh optimizer for one node, of its parameters as they are or ``one_by_one``.

        It updates the attached node.

        Raises:
            SettingsError: the optimizer does not take such parameters.
        """
        return optimizers.build(self._config, [*self._shared.parameters] if one_by_one else self.trained)
