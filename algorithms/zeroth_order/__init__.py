"""Methods without gradients: losses at several points, and what can be learned from them."""

from algorithms.zeroth_order.just_one_byte import JustOneByte
from algorithms.zeroth_order.mezo import MeZO

__all__ = ["JustOneByte", "MeZO"]
