"""Who runs what, when: the controller, its two runtimes, and what people see of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator import _own_packages

_own_packages.put_first()

from orchestrator.api import load_model, resume, run, simulate  # noqa: E402 - these import our other packages

if TYPE_CHECKING:
    from orchestrator.records import Observer

__all__ = ["Observer", "load_model", "resume", "run", "simulate"]


def __getattr__(name: str) -> object:
    """Import ``Observer`` when it is asked for: its module takes seconds."""
    if name != "Observer":
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    from orchestrator.records import Observer

    return Observer
