"""One run, from its configuration to closed files."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from starling.orchestrator.signals import ENDING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path
    from typing import Any, TypeAlias

    from starling.orchestrator.checkpoints.store import CheckpointStore
    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.control.controller import Controller
    from starling.orchestrator.control.restore import Restoration
    from starling.orchestrator.records.lease import Lease
    from starling.orchestrator.records.observers import Observer, Summary
    from starling.orchestrator.records.run_directory import RunDirectory
    from starling.orchestrator.runtimes.interface import Runtime

    Source: TypeAlias = "str | Path | Mapping[str, Any] | Config"


_LOG = logging.getLogger("starling")


def resolve(config: Source, overrides: Sequence[str] = (), *, trust: bool = False) -> Config:
    """Return the validated configuration.

    Raises:
        ConfigError: one line for each thing that is wrong.
    """
    from starling.orchestrator.config.schema import Config, parse
    from starling.orchestrator.records.run_config import given

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
    restoration: Restoration | None = None,
    track: Callable[[Config, Path], Observer | None] | None = None,
) -> Summary:
    """Run to the end, whatever that is; leave nothing behind but the run directory.

    ``track`` makes what records the run elsewhere, by default in what ``tracking`` names.
    """
    from starling.orchestrator.checkpoints.schedule import checkpointing
    from starling.orchestrator.control.controller import Controller
    from starling.orchestrator.records.lease import Lease
    from starling.orchestrator.records.observers import Observers

    with contextlib.ExitStack() as stack:
        lease = lease or Lease(directory.path)
        stack.callback(lease.release)
        tracker = track(config, directory.path) if track else config.tracking.observer(directory.path)
        everyone = Observers([directory, *([tracker] if tracker else []), *observers])
        names = {"run_id": directory.run_id, "run_dir": str(directory.path)}
        checkpoints = checkpointing(config, directory.path, directory.run_id, runtime, store)
        if checkpoints is not None:
            stack.callback(checkpoints.close)
        more = {} if control else {"checkpoints": checkpoints, "restoration": restoration}
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
