"""A run's final model as MLflow keeps one: a traced graph (torch.export), which needs no code of ours and no pickle."""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from starling.actors.host.build import load_data
from starling.algorithms.words import listed
from starling.orchestrator.records.run_config import configuration
from starling.orchestrator.records.run_directory import load_model

if TYPE_CHECKING:
    from pathlib import Path

_EXAMPLES = 2
"""Samples that the model is traced with: with one, their number would become part of the graph."""


class _SeenError(Exception):
    """The model has been called: nothing more need be worked out."""


def save_for_mlflow(run_dir: Path, path: Path) -> None:
    """Write the model of a run so that ``mlflow.pytorch.load_model`` loads it.

    Raises:
        Exception: whatever ``torch.export`` has against the model.
    """
    from mlflow import pytorch
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    config = configuration(run_dir, trust=True)  # whoever sends it has asked for that already
    module = load_model(run_dir, trust=True)
    validation = load_data(config.task, config.data, config.num_nodes, config.seed).validation
    batch = validation.batch(torch.arange(min(_EXAMPLES, len(validation))))
    names, inputs = _inputs(config.task, module, batch)
    specs: list[ColSpec | TensorSpec] = [
        TensorSpec(one.numpy().dtype, (-1, *one.shape[1:]), name=name if len(inputs) > 1 else None)
        for name, one in zip(names, inputs, strict=True)
    ]
    # MLflow's annotation does not know of tensors, and its documentation does.
    example: Any = inputs[0] if len(inputs) == 1 else [one.numpy() for one in inputs]
    pytorch.save_model(
        _positional(module, names),
        str(path),
        input_example=example,
        signature=ModelSignature(inputs=Schema(specs)),
        pip_requirements=[f"torch=={importlib.metadata.version('torch')}"],
        serialization_format="pt2",
    )


def _inputs(task: Any, module: nn.Module, batch: tuple[Tensor, ...]) -> tuple[list[str], list[Tensor]]:  # noqa: ANN401 - a Task
    """Return the arguments with which the task calls its model on a batch, by name or by place."""
    seen: dict[str, Any] = {}

    def look(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.update({str(place): one for place, one in enumerate(arguments)} | named)
        raise _SeenError

    hook = module.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.no_grad():
            task.loss(module, batch)
    except _SeenError:
        pass
    finally:
        hook.remove()
    tensors = {name: one for name, one in seen.items() if isinstance(one, Tensor)}
    return [*tensors], [*tensors.values()]


class _Named(nn.Module):
    """A model that is called with names, called with tensors in order; its answer's logits, if it has several parts."""

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.module = module
        self._names = names

    def _answer(self, *inputs: Tensor) -> Tensor:
        answer: Any = self.module(**dict(zip(self._names, inputs, strict=True)))
        return answer if isinstance(answer, Tensor) else answer.logits


# torch.export wants to know how many there are.
class _OneNamed(_Named):
    def forward(self, first: Tensor) -> Tensor:
        return self._answer(first)


class _TwoNamed(_Named):
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self._answer(first, second)


def _positional(module: nn.Module, names: list[str]) -> nn.Module:
    if all(name.isdigit() for name in names):
        return module
    if len(names) > 2 or any(name.isdigit() for name in names):
        raise TypeError(f"its inputs {listed(names)} are more than two, or some of them have no name")
    return (_OneNamed if len(names) == 1 else _TwoNamed)(module, names)
