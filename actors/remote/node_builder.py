"""Builds the host of an actor's nodes from the driver's configuration."""

from __future__ import annotations

import gc
import os
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import ray
import torch
from pydantic import ValidationError

from starling.actors import IMPORTED_AT
from starling.actors.data import DataConfig
from starling.actors.host.build import build_replicas, load_data
from starling.actors.host.compatibility import difference
from starling.actors.host.failures import failure
from starling.actors.host.host import Host
from starling.actors.host.node_log import Tee
from starling.actors.host.recorded_clock import Times
from starling.actors.remote.messages import Ready, Setup
from starling.actors.replica.average import Average
from starling.actors.replica.spec import ReplicaSpec
from starling.actors.tasks import Task
from starling.actors.training.optimizers import OptimizerConfig
from starling.actors.wire.tickets import Failed
from starling.algorithms.api import Algorithm, Layout
from starling.algorithms.errors import StarlingError
from starling.algorithms.registry import carry, problems

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starling.actors.host.build import RunData
    from starling.actors.replica.replica import Replica
    from starling.algorithms.api import NodeId


class Built(NamedTuple):
    """The nodes of a process, in their initial state."""

    host: Host
    report: Ready


class NodeBuilder:
    """Prepares a process for a run: its modules, its data. Then builds nodes, at once or when they are needed.

    Args:
        setup: of the process.

    Raises:
        ValidationError: the configuration is none to this process.
        Exception: whatever a user's task raises.
    """

    def __init__(self, setup: Setup) -> None:
        # In the driver's order: a user's types.py must not hide the library's here if it does not there.
        driver = [folder for folder in setup.sys_path if Path(folder).exists()]
        sys.path[:] = [*driver, *(folder for folder in sys.path if folder not in driver)]
        carry(setup.parts)
        self._num_nodes = setup.num_nodes
        self._spec = ReplicaSpec(
            algorithm=Algorithm.model_validate(setup.algorithm),
            task=Task.model_validate(setup.task),
            optimizer=OptimizerConfig.model_validate(setup.optimizer),
            batch_size=setup.data["batch_size"],
            seed=setup.seed,
            rounds=setup.rounds,
            skip_nan=setup.skip_nan,
            min_batch=setup.data["min_batch"],
            average=None if setup.average is None else Average.model_validate(setup.average),
        )
        data = DataConfig.model_validate(setup.data)
        self.data: RunData = load_data(self._spec.task, data, setup.num_nodes, setup.seed)
        if not setup.nodes:
            self._spec.bench(torch.device("cpu"))  # what a first model imports and compiles is there from now on

    @staticmethod
    def prepare(setup: Setup) -> NodeBuilder | Failed:
        """Return a builder, or why the process cannot take part. What a user's task raises comes back as data."""
        # One thread: nodes of one machine share its cores, and the order of additions in a matrix product, hence the
        # bits of the result, depends on the number of threads.
        torch.set_num_threads(1)
        unlike = difference(setup.versions)
        if unlike is not None:
            return Failed(f"{_place()} cannot take part: {unlike}", None)
        try:
            return NodeBuilder(setup)
        except StarlingError as error:
            return Failed(str(error), None)
        except ValidationError as error:
            return Failed(f"{_place()}: {'; '.join(problems(error.errors()))}", None)
        except Exception as error:  # noqa: BLE001 - whatever a user's task raises is data here
            return failure(setup.nodes[0] if setup.nodes else 0, 0, error)

    def build(self, nodes: Sequence[NodeId], incarnation: int, began: float = IMPORTED_AT) -> Built | Failed:
        """Build the replicas of ``nodes``, in their initial state; the process has been wanted since ``began``."""
        devices, gpus, warnings = pin_devices(len(nodes))
        try:
            times = Times()
            replicas = build_replicas(nodes, self._spec, self.data, devices, times, incarnation)
            host = Host(replicas, times)
            if not self._spec.algorithm.synchronous:
                times.record()
            # What is printed is copied to the log of the node whose code is running.
            sys.stdout = Tee(sys.stdout, host.logs)
            sys.stderr = Tee(sys.stderr, host.logs)
            host.init()
            baselines = self._spec.task.baselines(self._num_nodes)
        except StarlingError as error:
            return Failed(str(error), None)
        except Exception as error:  # noqa: BLE001 - whatever a user's task raises is data here
            return failure(nodes[0], 0, error)
        gc.freeze()  # what is here now stays; collections need not walk it again
        return Built(host, self.ready(replicas, devices, gpus, warnings, baselines, began))

    def ready(
        self,
        replicas: Sequence[Replica] = (),
        devices: Sequence[torch.device] = (),
        gpus: tuple[str, ...] = (),
        warnings: tuple[str, ...] = (),
        baselines: dict[str, float] | None = None,
        began: float = IMPORTED_AT,
    ) -> Ready:
        """Report the process as up, with its nodes if it has any."""
        nodes = [replica.id for replica in replicas]
        return Ready(
            place=_place(),
            devices=dict(zip(nodes, map(str, devices), strict=True)),
            gpus=gpus,
            num_samples={replica.id: replica.num_samples for replica in replicas},
            layout=replicas[0].layout if replicas else Layout((), torch.float32),
            baselines=baselines or {},
            warnings=warnings,
            part_sizes=self.data.part_sizes,
            fingerprint=self.data.fingerprint(),
            pid=os.getpid(),
            machine=ray.get_runtime_context().get_node_id(),
            import_s=time.monotonic() - began,
        )


def _place() -> str:
    return f"pid {os.getpid()} on {ray.util.get_node_ip_address()} ({platform.node()})"


def pin_devices(num_nodes: int) -> tuple[list[torch.device], tuple[str, ...], tuple[str, ...]]:
    """Return each node's device among the GPUs that Ray assigned to the process, their ids, and warnings."""
    gpus = tuple(str(gpu) for gpu in ray.get_gpu_ids())
    cpu = [torch.device("cpu")] * num_nodes
    if not gpus:
        # Ray leaves the variable unset for actors without GPUs, and then torch would see all of them.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return cpu, (), ()
    if torch.cuda.is_available():
        visible = torch.cuda.device_count()
        return [torch.device("cuda", place * visible // num_nodes) for place in range(num_nodes)], gpus, ()
    return cpu, gpus, (f"GPU {', '.join(gpus)} is assigned, but torch sees none: it trains on the CPU",)
