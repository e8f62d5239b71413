"""Who runs what, when: the controller, its two runtimes, and what people see of them."""

from orchestrator.api import run, simulate

__all__ = ["run", "simulate"]
