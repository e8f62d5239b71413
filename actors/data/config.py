"""The ``data`` section of the configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveInt

from actors.data.partition import Iid, Partition


class DataConfig(BaseModel):
    """Where a node's samples come from, and how many make a batch."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    source: Literal["pooled"] = "pooled"  # the task's own samples, divided by the partition
    partition: Partition = Iid()  # not asked for samples that have owners
    batch_size: PositiveInt = 32  # per node and optimizer step
