"""Output streams of commands, and views that may fail without ending a run."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from starling.orchestrator.streams import say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from starling.orchestrator.cli.run_display import Display
    from starling.orchestrator.cli.sweep_display import SweepDisplay


_LOG = logging.getLogger("starling")


@contextlib.contextmanager
def everything_to_stderr() -> Iterator[None]:
    """Send to stderr what is printed: by Python code, and, as far as possible, by libraries and child processes."""
    with contextlib.ExitStack() as stack:
        try:
            stdout = sys.stdout.fileno()
            stderr = sys.stderr.fileno()
        except (OSError, ValueError, AttributeError):
            pass  # captured by a test: these are no files
        else:
            sys.stdout.flush()
            kept = os.dup(stdout)
            os.dup2(stderr, stdout)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, stdout)
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


class LiveView:
    """Something that shows; that it cannot any more ends nothing of what it shows."""

    is_broken: bool = False


_V = TypeVar("_V", bound=LiveView)
_P = ParamSpec("_P")


def unfailing(method: Callable[Concatenate[_V, _P], None]) -> Callable[Concatenate[_V, _P], None]:
    """Let a method of a view do nothing from the first time that one fails; this is said."""

    @functools.wraps(method)
    def guarded(view: _V, *args: _P.args, **kwargs: _P.kwargs) -> None:
        if view.is_broken:
            return
        try:
            method(view, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 - whatever a terminal, or what draws on it, does
            view.is_broken = True
            _LOG.warning("nothing more is shown (%s: %s); all else goes on", type(error).__name__, error)

    return guarded


class _Notes(logging.Handler):
    """Shows warnings without tearing the live view."""

    def __init__(self, view: Display | SweepDisplay) -> None:
        super().__init__(logging.WARNING)
        self._view = view

    def emit(self, record: logging.LogRecord) -> None:
        """Show one."""
        if self._view.is_broken:
            say(f"warning: {record.getMessage()}", err=True)
        else:
            self._view.note(record.getMessage())


@contextlib.contextmanager
def warnings_shown_by(view: Display | SweepDisplay) -> Iterator[None]:
    """Let ``view`` show our warnings meanwhile."""
    logger = logging.getLogger("starling")
    handler = _Notes(view)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
