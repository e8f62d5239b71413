"""Methods that communicate rarely: many inner steps for each exchange; and data-parallel training, for comparison."""

from starling.algorithms.low_communication.a_edit import AEDiT
from starling.algorithms.low_communication.ddp import DDP
from starling.algorithms.low_communication.diloco import DiLoCo
from starling.algorithms.low_communication.eager_diloco import EagerDiLoCo
from starling.algorithms.low_communication.edit import EDiT
from starling.algorithms.low_communication.local_sgd import LocalSGD
from starling.algorithms.low_communication.streaming_diloco import StreamingDiLoCo

__all__ = ["DDP", "AEDiT", "DiLoCo", "EDiT", "EagerDiLoCo", "LocalSGD", "StreamingDiLoCo"]
