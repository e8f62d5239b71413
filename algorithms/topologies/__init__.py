"""The topology interface: who exchanges with whom, and with which weight. Each topology has a module of its own."""

from starling.algorithms.topologies.base import GraphTopology, Topology
from starling.algorithms.topologies.circulant import CirculantTopology
from starling.algorithms.topologies.mixing import Mixing
from starling.algorithms.topologies.ring import Ring
from starling.algorithms.topologies.undirected import RandomTopology, UndirectedTopology

__all__ = ["CirculantTopology", "GraphTopology", "Mixing", "RandomTopology", "Ring", "Topology", "UndirectedTopology"]
