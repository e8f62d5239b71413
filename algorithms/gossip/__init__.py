"""Decentralized methods: every node has a model of its own, and mixes it with those of its neighbours."""

from algorithms.gossip.base import Gossip
from algorithms.gossip.dsgd import DSGD
from algorithms.gossip.gradient_tracking import GradientTracking
from algorithms.gossip.random_walk import RandomWalk
from algorithms.gossip.single_merge import SingleMerge

__all__ = ["DSGD", "Gossip", "GradientTracking", "RandomWalk", "SingleMerge"]
