"""The ``data`` section of the configuration."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from starling.actors.data.partition import Iid, Partition
from starling.actors.data.samplers import Epoch, Poisson, Sampler


class DataConfig(BaseModel):
    """The source and partition of the data, and the batch size."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    source: Literal["pooled", "federated"] = "pooled"  # one pool, divided by the partition; or each node's own data
    partition: Partition = Iid()  # of pooled samples; not asked where samples have owners
    sampler: Sampler = Epoch()  # in which order a node draws its samples
    batch_size: PositiveInt = 32  # per node and optimizer step
    min_batch: PositiveInt = 1  # an epoch's rest of fewer samples joins the batch before it

    @model_validator(mode="after")
    def _check_min_batch(self) -> Self:
        if self.min_batch > self.batch_size:
            text = f"min_batch ({self.min_batch}) is more than batch_size ({self.batch_size}); lower it"
            raise PydanticCustomError("min_batch", "{text}", {"text": text})
        if self.min_batch > 1 and isinstance(self.sampler, Poisson):
            text = (
                "min_batch cannot be kept by the sampler poisson, whose batches are as large as they come; set it to 1"
            )
            raise PydanticCustomError("min_batch", "{text}", {"text": text})
        return self
