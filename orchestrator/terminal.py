"""What commands do with the terminal: where output goes, and what Ctrl-C does."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from orchestrator.display import Display

_DEAF_S = 5.0
"""To a repeated Ctrl-C."""


@contextlib.contextmanager
def everything_to_stderr() -> Iterator[None]:
    """Send to stderr what is printed: by Python code, and, as far as possible, by libraries and child processes."""
    with contextlib.ExitStack() as stack:
        try:
            stdout = sys.stdout.fileno()
            stderr = sys.stderr.fileno()
        except (OSError, ValueError):
            pass  # captured by a test: these are no files
        else:
            sys.stdout.flush()
            kept = os.dup(stdout)
            os.dup2(stderr, stdout)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, stdout)
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does, and the impatient may repeat either.

    A repetition within seconds is not heard: it would cut short what the first one has begun to close. After that it
    is, for the first may have been lost (Python swallows what is raised in a finalizer).
    """
    heard_at = -_DEAF_S

    def interrupt(*_: object) -> None:
        nonlocal heard_at
        now = time.monotonic()
        if now - heard_at >= _DEAF_S:
            heard_at = now
            raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # a background job of a script is not meant to hear Ctrl-C
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Notes(logging.Handler):
    """Shows warnings without tearing the live view."""

    def __init__(self, view: Display) -> None:
        super().__init__(logging.WARNING)
        self._view = view

    def emit(self, record: logging.LogRecord) -> None:
        """Show one."""
        self._view.note(record.getMessage())


@contextlib.contextmanager
def warnings_shown_by(view: Display) -> Iterator[None]:
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
