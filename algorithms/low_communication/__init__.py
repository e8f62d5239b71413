"""Methods that communicate rarely: many inner steps for each exchange."""

from algorithms.low_communication.diloco import DiLoCo
from algorithms.low_communication.streaming_diloco import StreamingDiLoCo

__all__ = ["DiLoCo", "StreamingDiLoCo"]
