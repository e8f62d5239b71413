"""Who runs what, when: the controller, its two runtimes, and what people see of them."""

from orchestrator.api import load_model, run, simulate

__all__ = ["load_model", "run", "simulate"]
