"""Digits: scikit-learn's handwritten digits, 1797 images of 8×8 pixels in ten classes.

Small enough to train to 97 % in seconds on one core, and real. The split is fixed: every run, whatever its seed,
validates on the same 360 images.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
from abc import abstractmethod
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from starling.actors.data.samples import TensorSamples
from starling.actors.tasks.base import Task
from starling.algorithms.registry import Part
from starling.algorithms.seeds import generator

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NUM_CLASSES = 10
_NUM_PIXELS = 64
_TRAIN_FRACTION = 0.8


class DigitsModel(Part, family="digits model", catalog="starling.actors.tasks.digits"):
    """A classifier of 8×8 images, given as rows of 64 values."""

    @abstractmethod
    def build(self) -> nn.Module:
        """A freshly initialised module."""


class DigitsMLP(DigitsModel, name="mlp"):
    """One hidden layer."""

    width: PositiveInt = 128

    def build(self) -> nn.Module:
        """64 → ``width`` → 10."""
        layers: list[tuple[str, nn.Module]] = [
            ("hidden", nn.Linear(_NUM_PIXELS, self.width)),
            ("activation", nn.ReLU()),
            ("output", nn.Linear(self.width, _NUM_CLASSES)),
        ]
        return nn.Sequential(OrderedDict(layers))


class Linear(DigitsModel, name="linear"):
    """Softmax regression: convex, and so small that it can be trained by its losses alone."""

    def build(self) -> nn.Module:
        """64 → 10."""
        return nn.Sequential(OrderedDict([("output", nn.Linear(_NUM_PIXELS, _NUM_CLASSES))]))


class DigitsCNN(DigitsModel, name="cnn"):
    """Two convolutions with batch normalisation, so that there are buffers to take care of."""

    width: PositiveInt = 16  # channels of the first convolution; the second has twice as many

    def build(self) -> nn.Module:
        """8×8×1 → 4×4×``width`` → 2×2×2``width`` → 10."""
        layers: list[tuple[str, nn.Module]] = [
            ("image", nn.Unflatten(1, (1, 8, 8))),
            ("first", _convolution(1, self.width)),
            ("second", _convolution(self.width, 2 * self.width)),
            ("flat", nn.Flatten()),
            ("output", nn.Linear(8 * self.width, _NUM_CLASSES)),
        ]
        return nn.Sequential(OrderedDict(layers))


class Digits(Task, name="digits"):
    """Classify handwritten digits."""

    model: DigitsModel = DigitsMLP()

    def train_samples(self, num_nodes: int) -> TensorSamples:
        """1437 images, shape (64,), values in [0, 1], and their labels."""
        return _load()[0]

    def validation_samples(self, num_nodes: int) -> TensorSamples:
        """The other 360."""
        return _load()[1]

    def build(self) -> nn.Module:
        """The chosen model."""
        return self.model.build()

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Mean cross-entropy, in nats."""
        images, labels = batch
        return F.cross_entropy(module(images), labels)

    def metrics(self, module: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Loss and accuracy."""
        images, labels = batch
        logits = module(images)
        accuracy = (logits.argmax(dim=1) == labels).double().mean()
        return {"loss": F.cross_entropy(logits, labels), "accuracy": accuracy}

    def predictions(self, module: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Logits, shape (b, 10), and labels."""
        images, labels = batch
        return module(images), labels


def _convolution(inputs: int, outputs: int) -> nn.Module:
    layers: list[tuple[str, nn.Module]] = [
        # The mean that batch normalisation takes away would take a bias with it.
        ("convolution", nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)),
        ("norm", nn.BatchNorm2d(outputs)),
        ("activation", nn.ReLU()),
        ("pool", nn.MaxPool2d(2)),
    ]
    return nn.Sequential(OrderedDict(layers))


@functools.cache
def _load() -> tuple[TensorSamples, TensorSamples]:
    """Training and validation samples, read once per process."""
    rows = _read()
    images, labels = torch.tensor(rows[:, :-1] / 16, dtype=torch.float32), torch.tensor(rows[:, -1], dtype=torch.int64)
    order = torch.randperm(len(images), generator=generator("digits", "split"))
    train, validation = order.tensor_split([int(_TRAIN_FRACTION * len(order))])
    parts = ((images[part], labels[part]) for part in (train, validation))
    first, second = (TensorSamples(pixels, classes, labels=classes) for pixels, classes in parts)
    return first, second


def _read() -> NDArray[np.float64]:
    """Return a row for each image: 64 pixels from 0 to 16, and the label; shape (1797, 65)."""
    found = importlib.util.find_spec("sklearn")  # imports nothing: scikit-learn takes a second and 1,200 modules
    for folder in found.submodule_search_locations or () if found is not None else ():
        path = Path(folder, "datasets", "data", "digits.csv.gz")
        if path.is_file():
            with gzip.open(path, "rt", encoding="ascii") as lines:
                return np.loadtxt(lines, delimiter=",")
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return np.column_stack([pixels, labels])
