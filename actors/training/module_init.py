"""Modules: how the model of a run is made, the same in every process, and what is done to it before it is trained."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
from typing import TYPE_CHECKING, Any

import torch

from starling.actors.data.generators import seeded
from starling.actors.tasks import answers
from starling.actors.training.weights import load_into, read_weights
from starling.algorithms.errors import SettingsError
from starling.algorithms.seeds import derive_seed

if TYPE_CHECKING:
    from torch import nn

    from starling.actors.tasks import Task


def initial_module(task: Task, seed: int, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """The module with which a run of ``seed`` begins, on the CPU; ``device`` is where it will compute.

    Args:
        task: builds it.
        seed: of the run.
        device: whose generators are seeded, too.
        dtype: of its floating-point numbers; ``None``: as the task builds them, which is in float32.

    Raises:
        SettingsError: it is no module, or one that cannot be trained here.
        DataError: ``init_from`` cannot be read, or is of another model.
    """
    with seeded(derive_seed(seed, "init"), device):
        module = answers.module(task, task.build())
    if dtype is not None:
        module = answers.converted(task, module, torch.device("cpu"), dtype)
    if task.init_from is not None:
        load_into(module, read_weights("task.init_from", task.init_from), "task.init_from", task.init_from)
    return module


def compile_in_place(module: nn.Module, device: torch.device) -> None:
    """Let the module be compiled by ``torch.compile`` when it is first called; its parameters may be rebound as before.

    Raises:
        SettingsError: there is nothing here to compile with.
    """
    where = "set optimizer.compile: false, or install one"
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise SettingsError(f"optimizer.compile: on a GPU it takes Triton, and there is none here; {where}")
    elif not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))):
        raise SettingsError(
            f"optimizer.compile: on a CPU it takes a C++ compiler (g++, clang++ or CXX), and there is none; {where}"
        )
    forward = module.forward

    # Not module.compile(): dynamo passes over modules that torch itself defines, a Sequential for one.
    def compiled(*inputs: Any, **named: Any) -> Any:  # noqa: ANN401 - whatever the module takes and returns
        return forward(*inputs, **named)

    # By itself inductor keeps a pool of processes; nodes of one machine share its cores anyway.
    module.forward = torch.compile(compiled, options={"compile_threads": 1})


def give_back_memory() -> None:
    """Let the system have what was freed: glibc keeps what is smaller than the largest block that was freed before."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
