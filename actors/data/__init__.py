"""Data: which samples a node owns, and in which order it draws them."""

from actors.data.config import DataConfig
from actors.data.partition import Iid, Partition, assign
from actors.data.samplers import EpochSampler, Position

__all__ = ["DataConfig", "EpochSampler", "Iid", "Partition", "Position", "assign"]
