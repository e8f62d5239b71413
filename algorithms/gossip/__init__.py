"""Decentralized methods: every node has a model of its own, and mixes it with those of its neighbours."""

from starling.algorithms.gossip.base import Gossip
from starling.algorithms.gossip.dsgd import DSGD
from starling.algorithms.gossip.gradient_tracking import GradientTracking
from starling.algorithms.gossip.random_walk import RandomWalk
from starling.algorithms.gossip.single_merge import SingleMerge

__all__ = ["DSGD", "Gossip", "GradientTracking", "RandomWalk", "SingleMerge"]
