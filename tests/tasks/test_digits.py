"""Digits: the split, the models, and that they learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sklearn.datasets import load_digits

from starling.actors.tasks import Task, digits
from starling.actors.tasks.digits import Digits, DigitsCNN, DigitsMLP
from starling.algorithms.registry import find


def test_configuration():
    assert find(Task, "digits") is Digits
    assert Digits.model_validate({"model": "cnn"}).model == DigitsCNN()
    task = Digits.model_validate({"name": "digits", "model": {"name": "mlp", "width": 7}})
    assert task.model == DigitsMLP(width=7)
    assert Digits.model_validate(task.model_dump()) == task
    with pytest.raises(ValidationError, match="no digits model is called 'mpl'"):
        Digits.model_validate({"model": "mpl"})


@pytest.mark.parametrize("layout", ["as it is", "another"])
def test_images_and_labels_are_those_that_scikit_learn_loads(layout: str, monkeypatch: pytest.MonkeyPatch):
    """They are read from its file without it; a version that keeps them elsewhere is asked for them."""
    if layout == "another":
        monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    pixels, labels = load_digits(return_X_y=True)
    rows = digits._read()
    assert rows.shape == (1797, 65)
    assert np.array_equal(rows[:, :-1], pixels)
    assert np.array_equal(rows[:, -1], labels)


def test_split():
    train, validation = Digits().train_samples(3), Digits().validation_samples(3)
    assert (len(train), len(validation)) == (1437, 360)
    assert train.owners is None
    images, labels = train.batch(torch.tensor([5, 0, 5]))
    assert (images.shape, images.dtype, labels.dtype) == ((3, 64), torch.float32, torch.int64)
    assert torch.equal(images[0], images[2])

    every = [samples.batch(torch.arange(len(samples))) for samples in (train, validation)]
    pixels = torch.cat([images for images, _ in every])
    assert (float(pixels.min()), float(pixels.max())) == (0.0, 1.0)
    assert torch.cat([labels for _, labels in every]).unique().tolist() == list(range(10))
    assert Digits().train_samples(4) is train  # read once per process


@pytest.mark.parametrize(("task", "num_parameters"), [(Digits(), 9_610), (Digits(model=DigitsCNN()), 6_138)])
def test_models(task: Digits, num_parameters: int):
    torch.manual_seed(0)
    module = task.build()
    torch.manual_seed(0)
    again = task.build()
    assert sum(parameter.numel() for parameter in module.parameters()) == num_parameters
    for one, other in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)

    batch = task.validation_samples(1).batch(torch.arange(50))
    metrics = task.metrics(module.eval(), batch)
    assert torch.equal(metrics["loss"], task.loss(module, batch))
    assert float(metrics["loss"].detach()) == pytest.approx(math.log(10), abs=0.3)
    assert all(value.shape == () for value in metrics.values())


def test_buffers_are_those_of_batch_norm():
    assert not list(Digits().build().buffers())
    names = [name for name, buffer in Digits(model=DigitsCNN()).build().named_buffers() if buffer.is_floating_point()]
    assert names == [f"{layer}.norm.running_{what}" for layer in ("first", "second") for what in ("mean", "var")]


@pytest.mark.parametrize("task", [Digits(), Digits(model=DigitsCNN(width=4))])
def test_learns(task: Digits):
    torch.manual_seed(1)
    module = task.build()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    train, validation = task.train_samples(1), task.validation_samples(1)
    for indices in torch.randperm(len(train)).split(64) + torch.randperm(len(train)).split(64):
        optimizer.zero_grad()
        task.loss(module, train.batch(indices)).backward()
        optimizer.step()
    metrics = task.metrics(module.eval(), validation.batch(torch.arange(len(validation))))
    assert float(metrics["accuracy"]) > 0.85
