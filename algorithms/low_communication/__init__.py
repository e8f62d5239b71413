"""Methods that communicate rarely: many inner steps for each exchange."""

from algorithms.low_communication.diloco import DiLoCo

__all__ = ["DiLoCo"]
