"""The workbench: all that the nodes of a process share to compute losses, gradients and steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starling.actors.training.evaluator import Evaluator
from starling.actors.training.gradients import Gradients
from starling.actors.training.optimizer_factory import OptimizerFactory
from starling.actors.training.shared_module import SharedModule
from starling.actors.training.task_loss import TaskLoss

if TYPE_CHECKING:
    import torch

    from starling.actors.tasks import Task
    from starling.actors.training.optimizers import OptimizerConfig


class Workbench:
    """The module on which the nodes of one process take turns, and what is computed with it.

    Args:
        task: of the run.
        config: of the optimizer.
        seed: of the run.
        device: of the nodes.

    Raises:
        SettingsError: the optimizer does not take the module's parameters.
    """

    def __init__(self, task: Task, config: OptimizerConfig, seed: int, device: torch.device) -> None:
        self.shared = SharedModule(task, config, seed, device)
        self.optimizers = OptimizerFactory(config, self.shared)
        self.loss = TaskLoss(task, config, self.shared)
        self.gradients = Gradients(task, config, self.shared, self.loss, is_flat=self.optimizers.is_flat)
        self.evaluator = Evaluator(task, self.shared, self.loss)
        self.is_random = False
        """Whether samples were seen to draw from the generators of the process."""
        self.can_be_probed = False
        """Whether the module was checked for probes, and nothing speaks against them."""
