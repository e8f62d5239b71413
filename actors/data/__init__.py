"""Data: which samples a node owns, and in which order it draws them."""

from starling.actors.data.config import DataConfig
from starling.actors.data.indices import Indices, Ranges
from starling.actors.data.partition import Iid, Partition, assign
from starling.actors.data.plans import Place, PlannedDraws, Segment
from starling.actors.data.samplers import Blocks, Draws, Epoch, EpochSampler, Position, Sampler, blocks_of

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
