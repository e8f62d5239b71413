"""Train one model on many unreliable, unequal, far-apart GPUs.

What a program calls (``run``, ``simulate``, ``resume``, ``sweep``, ``load_model``), what an algorithm is written with
(``Algorithm``, its operations), and what a task is made of. Each name is imported when it is first used: torch and Ray
take seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starling.actors.data import Partition, Sampler
    from starling.actors.tasks import DatasetSamples, Metric, Samples, Subset, Task, TensorSamples
    from starling.algorithms.api import (
        SERVER,
        Algorithm,
        AllGather,
        AllReduce,
        Batch,
        Evaluate,
        Gradient,
        GradientReport,
        Handle,
        Inbox,
        Layout,
        Left,
        Loss,
        Message,
        NeighborAllGather,
        Node,
        NodeId,
        NodeState,
        Ping,
        Receive,
        Reduced,
        Send,
        Sleep,
        Start,
        Step,
        Timeout,
        Train,
        TrainReport,
        View,
        Wait,
    )
    from starling.orchestrator.api import load_model, replay, resume, run, simulate
    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.errors import StarlingError
    from starling.orchestrator.records.observers import Observer, RoundRecord, Summary
    from starling.orchestrator.sweeps.sweep import sweep

_ALGORITHMS = (
    "SERVER Algorithm AllGather AllReduce Batch Evaluate Gradient GradientReport Handle Inbox Layout Left Loss "
    "Message NeighborAllGather Node NodeId NodeState Ping Receive Reduced Send Sleep Start Step Timeout Train "
    "TrainReport View Wait"
)
_MODULES = {
    "actors.data": "Partition Sampler",
    "actors.tasks": "DatasetSamples Metric Samples Subset Task TensorSamples",
    "algorithms.api": _ALGORITHMS,
    "orchestrator.api": "load_model replay resume run simulate",
    "orchestrator.config.schema": "Config",
    "orchestrator.errors": "StarlingError",
    "orchestrator.records.observers": "Observer RoundRecord Summary",
    "orchestrator.sweeps.sweep": "sweep",
}
_HOMES = {name: f"starling.{module}" for module, names in _MODULES.items() for name in names.split()}

__all__ = [  # noqa: RUF022 - in the order in which a reader meets them
    "run",
    "simulate",
    "resume",
    "replay",
    "sweep",
    "load_model",
    "Config",
    "StarlingError",
    "Observer",
    "RoundRecord",
    "Summary",
    "Algorithm",
    "Node",
    "NodeId",
    "NodeState",
    "SERVER",
    "View",
    "Layout",
    "Train",
    "TrainReport",
    "Batch",
    "Gradient",
    "GradientReport",
    "Loss",
    "Step",
    "Evaluate",
    "Sleep",
    "AllReduce",
    "Reduced",
    "AllGather",
    "NeighborAllGather",
    "Inbox",
    "Start",
    "Handle",
    "Wait",
    "Send",
    "Receive",
    "Message",
    "Left",
    "Timeout",
    "Ping",
    "Task",
    "Metric",
    "Samples",
    "TensorSamples",
    "DatasetSamples",
    "Subset",
    "Sampler",
    "Partition",
]


def __getattr__(name: str) -> object:
    """Import a public name when it is asked for."""
    if name not in _HOMES:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    found = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """List the public names, also those that are not imported yet."""
    return sorted({*globals(), *_HOMES})
