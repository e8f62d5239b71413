"""The ``data`` section of the configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveInt

from actors.data.partition import Iid, Partition
from actors.data.samplers import Epoch, Sampler


class DataConfig(BaseModel):
    """Where a node's samples come from, and how many make a batch."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    source: Literal["pooled", "federated"] = "pooled"  # one pool, divided by the partition; or each node's own data
    partition: Partition = Iid()  # of pooled samples; not asked where samples have owners
    sampler: Sampler = Epoch()  # in which order a node draws its samples
    batch_size: PositiveInt = 32  # per node and optimizer step
