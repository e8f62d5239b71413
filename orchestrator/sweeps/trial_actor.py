"""A trial of a sweep as Ray Tune sees it: an actor in which the controller of one run lives after another.

The trial has a placement group of its own. The controller is on the machine on which the sweep was started, where run
directories are, and asks for nothing; each process of nodes has a bundle. All of them are there, or none.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.util.placement_group import placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from starling.orchestrator import driver
from starling.orchestrator.config.schema import MLflowTracking, load
from starling.orchestrator.config.sections import CheckpointConfig
from starling.orchestrator.errors import StarlingError
from starling.orchestrator.records import run_config
from starling.orchestrator.runtimes.cluster import session
from starling.orchestrator.runtimes.cluster.placement import Placement
from starling.orchestrator.runtimes.cluster.runtime import Cluster
from starling.orchestrator.runtimes.simulator.runtime import Simulator
from starling.orchestrator.sweeps import trial_checkpoint
from starling.orchestrator.sweeps.space import assigned
from starling.orchestrator.sweeps.trial_thread import TrialRun
from starling.orchestrator.sweeps.trials import TRIALS, name_of
from starling.orchestrator.tracking.mlflow_tracker import MLflowTracker

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.records.observers import Observer, Summary
    from starling.orchestrator.runtimes.interface import Runtime

STOP_FILE = ".stop"
_PIN = 0.001
"""Amount of a machine's own resource, of which each has 1: enough to name the machine."""

Bundle = dict[str, float]


def bundles(config: Config, *, simulated: bool, machine: str | None) -> list[Bundle]:
    """Return the bundles that a trial reserves: the controller's, then one for each process of nodes."""
    head: Bundle = {machine: _PIN} if machine else {}
    if simulated:
        return [head | {"CPU": 1.0}]
    cluster = config.cluster
    per = cluster.nodes_per_actor
    sizes = [min(per, config.num_nodes - first) for first in range(0, config.num_nodes, per)]
    sizes += [per] * cluster.warm_spares
    processes = [{"CPU": cluster.num_cpus * size, "GPU": cluster.num_gpus * size} for size in sizes]
    if config.algorithm.has_server:
        processes.append({"CPU": cluster.num_cpus, "GPU": 0.0})
    wanted = [{name: amount for name, amount in one.items() if amount} for one in processes]
    return [head, *(one for one in wanted if one)]


def machine_of_driver() -> str | None:
    """Return the resource by which Ray names this machine; None if Ray does not know it."""
    name = f"node:{ray.util.get_node_ip_address()}"
    return name if name in ray.cluster_resources() else None


def count_fitting(wanted: list[Bundle], limit: int) -> int:
    """Return how many trials of ``wanted`` fit on the cluster at a time, at most ``limit``."""
    free = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    # The largest first: GPUs, then what else there is.
    order = sorted(wanted, key=lambda one: (-one.get("GPU", 0.0), -sum(one.values())))
    for count in range(limit):
        for bundle in order:
            machine = next(
                (one for one in free if all(one.get(name, 0.0) + 1e-6 >= amount for name, amount in bundle.items())),
                None,
            )
            if machine is None:
                return count
            for name, amount in bundle.items():
                machine[name] -= amount
    return limit


@functools.cache
def _base(folder: str) -> tuple[Config, dict[str, Any]]:
    path = Path(folder)
    facts = json.loads((path / "sweep.json").read_text(encoding="utf-8"))
    for entry in facts["sys_path"]:
        if entry not in sys.path:
            sys.path.append(entry)
    return load(path / "config.yaml"), facts


def config_of(spec: dict[str, Any]) -> Config:
    """Return the configuration of a trial's run; Tune calls ``spec`` its config."""
    base, _ = _base(spec["folder"])
    config = assigned(base, {"seed": spec["seed"], **spec["values"]})
    if spec["clones"]:  # from the last round, and where it can be copied from
        return config.model_copy(update={"checkpoint": CheckpointConfig(every_rounds=1)})
    if spec["simulated"]:  # which is done again sooner than it is saved
        return config.model_copy(update={"checkpoint": CheckpointConfig(every_rounds=0)})
    return config


def _go_back() -> None:
    """Paths are relative to where the sweep was started; before each trial Tune goes to a folder of that trial's."""
    os.chdir(os.environ["TUNE_ORIG_WORKING_DIR"])


class StarlingTrial(tune.Trainable):
    """One run after the other: Tune gives the actor of a trial that is over to the next one.

    Its config has ``folder`` (the sweep's), ``number``, ``values``, ``seed``, ``simulated``, ``machine``, ``stepwise``,
    ``clones``.
    """

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        try:
            resolved = config_of(config)
        except StarlingError:  # values that do not go together, as the trial's only step will say
            resolved, _ = _base(config["folder"])
        wanted = bundles(resolved, simulated=config["simulated"], machine=config["machine"])
        return tune.PlacementGroupFactory(wanted, strategy="PACK")

    def setup(self, config: dict[str, Any]) -> None:
        _go_back()
        self._spec = config
        self._run: TrialRun | None = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        _go_back()
        self.cleanup()
        self._spec = new_config
        return True

    def step(self) -> dict[str, Any]:
        if self._run is None:
            try:
                self._run = self._begin()
            except StarlingError as error:
                return {"done": True, "end": "failed", "error": str(error).partition("\n")[0], "summary": None}
        return self._run.next()

    def cleanup(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.stop()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        trial_checkpoint.save(self._run_dir, Path(checkpoint_dir))

    def load_checkpoint(self, checkpoint: Any) -> None:  # noqa: ANN401 - a path, of what is saved as files
        self.cleanup()
        trial_checkpoint.load(Path(checkpoint), self._run_dir)

    @property
    def _run_dir(self) -> Path:
        return Path(self._spec["folder"]) / TRIALS / name_of(self._spec["number"])

    def _begin(self) -> TrialRun:
        spec, run_dir = self._spec, self._run_dir
        folder = Path(spec["folder"])
        config = config_of(spec)
        _, facts = _base(spec["folder"])
        done = run_config.finished(run_dir)
        if done is not None:  # when the sweep was killed, and nobody heard of it
            return TrialRun(
                functools.partial(trial_checkpoint.tell, run_dir, done),
                config.rounds,
                stepwise=False,
                stop_file=folder / STOP_FILE,
            )
        if spec["simulated"]:
            runtime: Runtime = Simulator(config)
        else:
            group = ray.util.get_current_placement_group()
            assert group is not None
            runtime = Cluster(config, TrialPlacement(config, group=group, sys_path=tuple(facts["sys_path"])))

        def track(config: Config, run_dir: Path) -> Observer | None:
            if not isinstance(config.tracking, MLflowTracking):
                return config.tracking.observer(run_dir)
            tags = {"sweep": folder.name, "trial": str(spec["number"])}
            return MLflowTracker(config.tracking, run_dir, sweep_dir=folder, tags=tags)

        def train(observer: Observer) -> Summary:
            directory, lease, restoration, store = trial_checkpoint.opened(
                config, run_dir, picture=not spec["simulated"]
            )
            resolved = config if restoration is None else restoration.config
            return driver.drive(
                resolved, runtime, directory, [observer], lease=lease, store=store, restoration=restoration, track=track
            )

        return TrialRun(train, config.rounds, stepwise=spec["stepwise"], stop_file=folder / STOP_FILE)


class TrialPlacement(Placement):
    """Places all actors of a run in the placement group of its trial.

    Args:
        config: of the run.
        group: the trial's.
        sys_path: where actors look for modules; empty if they bring their own.
    """

    def __init__(self, config: Config, *, group: PlacementGroup, sys_path: tuple[str, ...]) -> None:
        super().__init__(config)
        self._group = group
        self._path = sys_path

    def _connect(self, num_cpus: float) -> session.Session:
        del num_cpus
        return session.connect("auto", num_cpus=0)  # as the actor that we are in is

    def strategy(self) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self._group)

    def count(self, num_nodes: int) -> int:
        wanted = dict(zip(("CPU", "GPU"), self.demand(num_nodes), strict=True))
        if not any(wanted.values()):
            return self._config.cluster.num_actors
        table = placement_group_table(self._group)
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        sizes = self._group.bundle_specs
        return sum(
            table["bundles_to_node_id"].get(index) in alive
            and all(sizes[index].get(name, 0.0) + 1e-6 >= amount for name, amount in wanted.items())
            for index in range(1, len(sizes))
        )

    def count_free(self, num_nodes: int, num_alive: int) -> int:
        if not any(self.demand(num_nodes)):
            return self._config.cluster.num_actors
        return max(0, self.count(num_nodes) - num_alive)

    def sys_path(self) -> tuple[str, ...]:
        return self._path
