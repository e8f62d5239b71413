"""One training from Python: ``run`` on a cluster, ``simulate`` in this process.

::

    from orchestrator import simulate

    summary = simulate("examples/fedavg.yaml", ["rounds=5"])
    print(summary.metrics, summary.digest)

What takes seconds to import is imported by these functions, and not by their module.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import signal
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from orchestrator.errors import DivergedError
from orchestrator.terminal import ENDING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path
    from typing import Any, TypeAlias

    from torch import nn

    from orchestrator.checkpoints import CheckpointStore
    from orchestrator.config import Config
    from orchestrator.controller import Controller
    from orchestrator.lease import Lease
    from orchestrator.records import Observer, Summary
    from orchestrator.revival import Revival
    from orchestrator.run_directory import RunDirectory
    from orchestrator.runtime import Runtime

    Source: TypeAlias = "str | Path | Mapping[str, Any] | Config"

_LOG = logging.getLogger("starling")


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
    from orchestrator.cluster import Cluster
    from orchestrator.run_directory import RunDirectory

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
    from orchestrator.run_directory import RunDirectory
    from orchestrator.simulator import Simulator

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
    from orchestrator import resumption
    from orchestrator.lease import Lease
    from orchestrator.run_directory import RunDirectory

    path = resumption.directory(run_dir)
    finished = None if overrides else resumption.finished(path)
    if finished is not None:
        return finished
    lease = Lease(path)
    try:
        revival, store, is_virtual = resumption.revival(
            path, overrides, from_previous=from_previous, trust=trust, accept_changes=accept_changes
        )
        directory = RunDirectory(revival.config, path, resumed=revival.checkpoint.controller)
        if is_virtual:
            from orchestrator.simulator import Simulator as Kind
        else:
            from orchestrator.cluster import Cluster as Kind
        runtime = Kind(revival.config)
    except BaseException:
        lease.release()
        raise
    return drive(revival.config, runtime, directory, observers, lease=lease, store=store, revival=revival)


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

    from orchestrator.replay import History, ReplayController
    from orchestrator.run_directory import RunDirectory
    from orchestrator.sections import CheckpointConfig
    from orchestrator.simulator import Simulator

    resolved = resolve(Path(history_dir) / "config.yaml" if config is None else config, trust=trust)
    history = History.read(history_dir)
    resolved = resolved.model_copy(update={"checkpoint": CheckpointConfig(every_rounds=0)})
    directory, controller = RunDirectory(resolved, run_dir), functools.partial(ReplayController, history=history)
    summary = drive(resolved, Simulator(resolved), directory, observers, controller)
    if summary.digest != history.digest:
        raise DivergedError(f"the replay ends with digest {summary.digest}, and {history_dir} with {history.digest}")
    return summary


def load_model(run_dir: str | Path, *, trust: bool = False) -> nn.Module:
    """The model that a run ended with, as a module in evaluation mode, in float32 on the CPU.

    Args:
        run_dir: of the run.
        trust: as for ``resume``.

    Raises:
        StarlingError: it is not a run's directory, or the run did not end with a model.
    """
    from orchestrator import run_directory

    return run_directory.load_model(run_dir, trust=trust)


def resolve(config: Source, overrides: Sequence[str] = (), *, trust: bool = False) -> Config:
    """The validated configuration.

    Raises:
        ConfigError: one line for each thing that is wrong.
    """
    from orchestrator.config import Config, parse
    from orchestrator.resumption import given

    if isinstance(config, Config):
        return parse(config.dump(), overrides) if overrides else config
    return parse(config, overrides) if isinstance(config, Mapping) else given(config, overrides, trust=trust)


def drive(
    config: Config,
    runtime: Runtime,
    directory: RunDirectory,
    observers: Sequence[Observer],
    control: Callable[..., Controller] | None = None,
    *,
    lease: Lease | None = None,
    store: CheckpointStore | None = None,
    revival: Revival | None = None,
    track: Callable[[Config, Path], Observer | None] | None = None,
) -> Summary:
    """Run to the end, whatever that is; leave nothing behind but the run directory.

    ``track`` makes what records the run elsewhere, by default in what ``tracking`` names.
    """
    from orchestrator.checkpointing import checkpointing
    from orchestrator.controller import Controller
    from orchestrator.lease import Lease
    from orchestrator.records import Observers

    with contextlib.ExitStack() as stack:
        lease = lease or Lease(directory.path)
        stack.callback(lease.release)
        tracker = track(config, directory.path) if track else config.tracking.observer(directory.path)
        everyone = Observers([directory, *([tracker] if tracker else []), *observers])
        names = {"run_id": directory.run_id, "run_dir": str(directory.path)}
        checkpoints = checkpointing(config, directory.path, directory.run_id, runtime, store)
        if checkpoints is not None:
            stack.callback(checkpoints.close)
        more = {} if control else {"checkpoints": checkpoints, "revival": revival}
        controller = (control or Controller)(config, runtime, everyone, **names, may_commit=lease.check, **more)
        stack.enter_context(_kept_handlers())
        try:
            summary = controller.run()
        except BaseException as error:
            # Ray's handler of SIGTERM raises SystemExit.
            interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
            with _undisturbed():
                if interrupted:
                    controller.save()
                if checkpoints is not None:
                    checkpoints.close()  # while the nodes are there: it may be waiting for what they hold
                summary = controller.summary("interrupted" if interrupted else "failed")
                runtime.close()
                lease.release()
            with _undisturbed():  # once more: Ray's core takes the handler of SIGTERM away when it shuts down
                _end_badly(everyone, summary)
            if isinstance(error, SystemExit):
                raise KeyboardInterrupt from None
            raise
        with _undisturbed():
            if checkpoints is not None:
                checkpoints.close()  # as above
            runtime.close()
            lease.release()
        with _undisturbed():
            everyone.on_end(summary)
    return summary


def _end_badly(everyone: Observer, summary: Summary) -> None:
    """Tell the observers, and keep what they may raise from hiding why the run ended."""
    try:
        everyone.on_end(summary)
    except Exception as error:  # noqa: BLE001 - as said
        _LOG.warning("the end of the run was not recorded: %s", error)


@contextlib.contextmanager
def _kept_handlers() -> Iterator[None]:
    """Put signal handlers back: Ray leaves one of its own for SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # None: it was not installed from Python, and cannot be put back from it
                signal.signal(number, handler)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Close to the end: every wait in it is bounded, and a second Ctrl-C would leave processes behind."""
    with _kept_handlers():
        if threading.current_thread() is threading.main_thread():
            for number in ENDING:
                # Not SIG_IGN, which processes that are started now would inherit.
                if signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, lambda *_: None)
        yield
