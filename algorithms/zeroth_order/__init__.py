"""Methods without gradients: losses at several points, and what can be learned from them."""

from starling.algorithms.zeroth_order.cbo import CBO
from starling.algorithms.zeroth_order.fzoos import FZooS
from starling.algorithms.zeroth_order.just_one_byte import JustOneByte
from starling.algorithms.zeroth_order.mezo import MeZO

__all__ = ["CBO", "FZooS", "JustOneByte", "MeZO"]
