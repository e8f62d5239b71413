"""Models: what tasks on tables and images train, by name or by import path.

One of one's own derives from ``Model``::

    class Wide(Model):
        width: PositiveInt = 4096

        def build(self, shape, outputs):
            hidden = nn.Linear(math.prod(shape), self.width)
            return nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(self.width, outputs))
"""

from __future__ import annotations

import math
from abc import abstractmethod

from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from starling.algorithms.errors import SettingsError
from starling.algorithms.registry import Part


class Model(Part, family="model", catalog="starling.actors.tasks.models"):
    """A network from inputs of one shape to a number of outputs."""

    @abstractmethod
    def build(self, shape: tuple[int, ...], outputs: int) -> nn.Module:
        """A freshly initialised module that maps (b, *``shape``) to (b, ``outputs``), in float32 on the CPU.

        Raises:
            SettingsError: it takes no such inputs.
        """


class MLP(Model, name="mlp"):
    """A perceptron of any depth; without hidden layers, a linear model."""

    hidden: tuple[PositiveInt, ...] = (64,)  # units of each hidden layer; []: a linear model
    normalize: bool = False  # inputs, by the mean and variance of batches (they are buffers of the model)
    dropout: NonNegativeFloat = 0.0  # share of hidden units that a training step leaves out

    def build(self, shape: tuple[int, ...], outputs: int) -> nn.Module:
        """Flatten, then layers with ReLU between them."""
        width = math.prod(shape)
        layers: list[nn.Module] = [nn.Flatten()]
        if self.normalize:
            layers.append(nn.BatchNorm1d(width))
        for units in self.hidden:
            layers += [nn.Linear(width, units), nn.ReLU()]
            if self.dropout:
                layers.append(nn.Dropout(self.dropout))
            width = units
        return nn.Sequential(*layers, nn.Linear(width, outputs))


class CNN(Model, name="cnn"):
    """Convolutions for images: each stage halves the side and doubles the channels; the mean over places is classified.

    Normalisation is over groups of channels and within one sample: nothing that nodes with different data would have to
    average.
    """

    width: PositiveInt = 16  # channels of the first stage
    stages: PositiveInt = 3

    def build(self, shape: tuple[int, ...], outputs: int) -> nn.Module:
        """(b, channels, height, width) to (b, ``outputs``)."""
        if len(shape) != 3:
            raise SettingsError(f"task.model: cnn takes images, and the inputs have the shape {list(shape)}; take mlp")
        if min(shape[1:]) < 2**self.stages:
            raise SettingsError(
                f"task.model.stages: {self.stages} stages halve images of {shape[1]}×{shape[2]} below one pixel; "
                "lower it"
            )
        layers: list[nn.Module] = []
        channels, width = shape[0], self.width
        for _ in range(self.stages):
            layers += [
                nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False),
                nn.GroupNorm(1, width),
                nn.ReLU(),
            ]
            layers.append(nn.MaxPool2d(2))
            channels, width = width, 2 * width
        return nn.Sequential(*layers, _Pooled(), nn.Linear(channels, outputs))


class _Pooled(nn.Module):
    """The mean over all places of an image: (b, c, h, w) → (b, c)."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))
