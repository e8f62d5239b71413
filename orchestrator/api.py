"""One training from Python: ``run`` on a cluster, ``simulate`` in this process.

::

    from starling import simulate

    summary = simulate("examples/fedavg.yaml", ["rounds=5"])
    print(summary.metrics, summary.digest)

Modules that take seconds to import are imported by these functions, and not by this module.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from starling.orchestrator.driver import drive, resolve
from starling.orchestrator.errors import DivergedError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import Any, TypeAlias

    from torch import nn

    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.records.observers import Observer, Summary

    Source: TypeAlias = "str | Path | Mapping[str, Any] | Config"


def run(
    config: Source,
    overrides: Sequence[str] = (),
    *,
    run_dir: str | Path | None = None,
    trust: bool = False,
    observers: Sequence[Observer] = (),
) -> Summary:
    """Train on a Ray cluster: one of our own on this machine, or the one at ``cluster.address``.

    Args:
        config: a file, its content, or a ``Config``.
        overrides: ``a.b=c`` each, applied to ``config`` in order.
        run_dir: where everything about the run is written; by default ``runs/<name>-<time>-<4 hex>``.
        trust: ``config`` lies in a run's directory, and what it names is used although somebody else wrote it.
        observers: told what happens, after the run directory and the tracker.

    Raises:
        StarlingError: the run could not begin, or failed; observers have had ``on_end`` by then.
        KeyboardInterrupt: it was interrupted (SIGINT, or SIGTERM while Ray runs), and closed cleanly.
    """
    resolved = resolve(config, overrides, trust=trust)
    from starling.orchestrator.records.run_directory import RunDirectory
    from starling.orchestrator.runtimes.cluster.runtime import Cluster

    return drive(resolved, Cluster(resolved), RunDirectory(resolved, run_dir), observers)


def simulate(
    config: Source,
    overrides: Sequence[str] = (),
    *,
    run_dir: str | Path | None = None,
    trust: bool = False,
    observers: Sequence[Observer] = (),
) -> Summary:
    """Train in this process, under a virtual clock and a model of the network. Arguments and errors as for ``run``."""
    resolved = resolve(config, overrides, trust=trust)
    from starling.orchestrator.records.run_directory import RunDirectory
    from starling.orchestrator.runtimes.simulator.runtime import Simulator

    return drive(resolved, Simulator(resolved), RunDirectory(resolved, run_dir), observers)


def resume(
    run_dir: str | Path,
    overrides: Sequence[str] = (),
    *,
    from_previous: bool = False,
    trust: bool = False,
    accept_changes: bool = False,
    observers: Sequence[Observer] = (),
) -> Summary:
    """Go on with a run that was interrupted, or failed, from its last checkpoint, where it ran: on Ray, or simulated.

    With the same number of nodes it ends with the bits with which it would have ended.

    Args:
        run_dir: of the run. A finished one is only told of, unless ``overrides`` change it (``rounds=200``).
        overrides: ``a.b=c`` each, applied to the run's configuration.
        from_previous: go on from the checkpoint before the last.
        trust: what the run's configuration names, code among it, is used although somebody else wrote it.
        accept_changes: ``config.yaml`` was edited, and that is meant.
        observers: as for ``run``.

    Raises:
        StarlingError: as for ``run``; also if there is no checkpoint that can be used.
    """
    from starling.orchestrator.control.restore import restoration
    from starling.orchestrator.records import run_config
    from starling.orchestrator.records.lease import Lease
    from starling.orchestrator.records.run_directory import RunDirectory

    path = run_config.directory(run_dir)
    finished = None if overrides else run_config.finished(path)
    if finished is not None:
        return finished
    lease = Lease(path)
    try:
        restored, store, is_virtual = restoration(
            path, overrides, from_previous=from_previous, trust=trust, accept_changes=accept_changes
        )
        directory = RunDirectory(restored.config, path, resumed=restored.checkpoint.controller)
        if is_virtual:
            from starling.orchestrator.runtimes.simulator.runtime import Simulator as Kind
        else:
            from starling.orchestrator.runtimes.cluster.runtime import Cluster as Kind
        runtime = Kind(restored.config)
    except BaseException:
        lease.release()
        raise
    return drive(restored.config, runtime, directory, observers, lease=lease, store=store, restoration=restored)


def replay(
    history_dir: str | Path,
    config: Source | None = None,
    *,
    run_dir: str | Path | None = None,
    trust: bool = False,
    observers: Sequence[Observer] = (),
) -> Summary:
    """Repeat a finished run in this process, as its log says, to the last bit.

    Args:
        history_dir: the directory of that run.
        config: by default that run's own.
        run_dir: where the replay is written, as for ``run``.
        trust: as for ``resume``.
        observers: as for ``run``.

    Raises:
        StarlingError: as for ``run``; also if the replay ends with another digest than the run.
    """
    from pathlib import Path

    from starling.orchestrator.config.sections import CheckpointConfig
    from starling.orchestrator.control.replay import ReplayController, RunHistory
    from starling.orchestrator.records.run_directory import RunDirectory
    from starling.orchestrator.runtimes.simulator.runtime import Simulator

    resolved = resolve(Path(history_dir) / "config.yaml" if config is None else config, trust=trust)
    history = RunHistory.read(history_dir)
    resolved = resolved.model_copy(update={"checkpoint": CheckpointConfig(every_rounds=0)})
    directory, controller = RunDirectory(resolved, run_dir), functools.partial(ReplayController, history=history)
    summary = drive(resolved, Simulator(resolved), directory, observers, controller)
    if summary.digest != history.digest:
        raise DivergedError(f"the replay ends with digest {summary.digest}, and {history_dir} with {history.digest}")
    return summary


def load_model(run_dir: str | Path, *, trust: bool = False) -> nn.Module:
    """Load the trained model of a run, as a module in evaluation mode, in float32 on the CPU.

    Args:
        run_dir: of the run.
        trust: as for ``resume``.

    Raises:
        StarlingError: it is not a run's directory, or the run did not end with a model.
    """
    from starling.orchestrator.records import run_directory

    return run_directory.load_model(run_dir, trust=trust)
