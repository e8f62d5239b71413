"""Signals that end a run in order, and what is done with those that come again."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end a run in order: Ctrl-C, ``kill``, a closed terminal. SIGQUIT (Ctrl-\\) ends the process at once."""


_DEAF_S = 5.0
"""Seconds in which a repeated signal is ignored."""


@contextlib.contextmanager
def interruptible(deaf_s: float = _DEAF_S) -> Iterator[None]:
    """SIGTERM and SIGHUP end a run as Ctrl-C does, and the impatient may repeat any.

    A repetition within seconds is not heard: it would cut short what the first one has begun to close. After that it
    is, for the first may have been lost (Python swallows what is raised in a finalizer).

    An ignored signal stays ignored. The background job of a script is not meant to hear Ctrl-C, and a job under nohup
    is not meant to hear of its terminal's end.
    """
    heard_at = -math.inf

    def interrupt(*_: object) -> None:
        nonlocal heard_at
        now = time.monotonic()
        if now - heard_at >= deaf_s:
            heard_at = now
            raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in ENDING}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
