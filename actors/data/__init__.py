"""Data: which samples a node owns, and in which order it draws them."""

from actors.data.config import DataConfig
from actors.data.indices import Indices, Ranges
from actors.data.partition import Iid, Partition, assign
from actors.data.plans import Place, PlannedDraws, Segment
from actors.data.samplers import Blocks, Draws, Epoch, EpochSampler, Position, Sampler, blocks_of

__all__ = [
    "Blocks",
    "DataConfig",
    "Draws",
    "Epoch",
    "EpochSampler",
    "Iid",
    "Indices",
    "Partition",
    "Place",
    "PlannedDraws",
    "Position",
    "Ranges",
    "Sampler",
    "Segment",
    "assign",
    "blocks_of",
]
